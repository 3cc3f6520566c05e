"""The model card of the demo's small models, in Markdown: how they were trained, and their metrics."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open

from stm.demo.recipe import Recipe
from stm.jobs.progress import format_seconds
from stm.storage.files import write_bytes

_TEXT = """\
# The small models of the demo and the small studies

Made by `stm/demo/train.py` (`snakemake demo_models` trains them again) from the generated dataset
moving-shapes alone. Licence: that of the repository. They know only the shapes, colors and backgrounds of that dataset.

| folder | model | parameters | bytes |
|---|---|---|---|
| `demo-clip` | CLIP for open_clip (`local-dir:`) | {clip_parameters:,} | {clip_bytes:,} |
| `demo-blip2` | `Blip2ForConditionalGeneration` with an OPT language model | {blip2_parameters:,} | {blip2_bytes:,} |

Weights are stored as float16 safetensors and load as float32.

Two more, with float32 weights, belong to the small video-language studies (docs/language.md): `demo-bert`, a BERT that is not
trained (`stm/demo/bert.py`), and `demo-fusion`, 224,448 parameters: a temporal transformer on the frozen features of `demo-clip`,
trained for 1,500 steps of 32 of 3,000 clips to tell how the named object moves, at chance in 1 of 12 (`stm/demo/fusion.py`).
The classifier that was trained with it, and is discarded, was right about 87 % of the clips of the last 150 steps.

## How they were made

- Data: {frames:,} frames, two at random times of each of {clips:,} clips of the split `demo-models`, seed {seed};
  half of them with JPEG artefacts. The demo's own splits have different names and therefore different clips.
- CLIP: {clip_steps:,} steps of 32 frames, 12 crops each (the scene, the whole object, patches of 10 to 27 px), with texts
  contrasted against patches of other objects and of the background. `stm/demo/clip.py`.
- BLIP-2: {blip2_steps:,} steps of 32 whole frames and their appearance captions. The image tower is initialised from CLIP's.
  `stm/demo/blip2.py`.
- In both, an auxiliary linear layer classifies what a crop or an image token shows; it helps the tower to learn and is discarded.
  `stm/demo/auxiliary_head.py`.
- Muon and AdamW, warm-up and cosine decay, bfloat16 autocast, on a CPU, torch threads: {threads}. Time: {times}.

## How good they are

On {held_out_frames} frames of {held_out_clips} clips of the split `demo-models-held-out`, with the models loaded by
open_clip and transformers.

CLIP: cosine of every cell of an 8 x 10 grid with a text, mean over frames. *Coverage*: share of the named object's true box that
the 60 % most similar cells cover; chance is 0.60. A box has empty corners, which look like background: *ceiling* ranks the
cells by the true share of object pixels and the others at random. *Low*: the 5th percentile over frames. *Pixels*: share of
the object's own pixels that is covered. *AUC*: cells at least half inside the box against cells outside that show
anything, only background, or another object.

| text | coverage | fixed camera | moving camera | low | pixels | AUC | AUC background | AUC objects |
|---|---|---|---|---|---|---|---|---|
{clip_rows}

BLIP-2: greedy captions against `appearance_caption`. In a frame with several objects, only size and position indicate which one
is named, so *any object* counts a caption that is correct for any object in view.

| captions | share |
|---|---|
{blip2_rows}
"""

_CAPTION_ROWS = {
    "alone": "exact, frames with one object in view",
    "some_object": "exact for any object in view, all frames",
    "named": "exact for the named object, all frames",
    "color": "color, frames with one object in view",
    "texture": "texture, frames with one object in view",
    "shape": "shape, frames with one object in view",
    "background": "background, all frames",
}
_CLIP_COLUMNS = (
    "coverage", "coverage_fixed", "coverage_moving", "coverage_low", "pixels", "auc", "auc_background", "auc_distractors",
)  # fmt: skip


def write_card(
    path: Path,
    recipe: Recipe,
    results: Mapping[str, Any],
    seconds: Mapping[str, float],
    folders: Sequence[Path],
) -> None:
    """Write the card.

    Args:
        results: the metrics per model (`clip`, `blip2`), and the numbers of `frames`.
        seconds: duration of each phase.
        folders: the folders of CLIP and BLIP-2.
    """
    text = _TEXT.format(
        **{f"{name}_bytes": folder_bytes(folder) for name, folder in zip(("clip", "blip2"), folders, strict=True)},
        clip_parameters=count_parameters(folders[0]),
        blip2_parameters=count_parameters(folders[1]),
        clips=recipe.clips,
        frames=results["frames"]["train"],
        seed=recipe.seed,
        threads=recipe.threads,
        clip_steps=recipe.clip_steps,
        blip2_steps=recipe.blip2_steps,
        times=", ".join(f"{what} {format_seconds(value)}" for what, value in seconds.items()),
        held_out_frames=results["frames"]["held_out"],
        held_out_clips=recipe.held_out_clips,
        clip_rows="\n".join(_clip_row(name, row) for name, row in results["clip"].items()),
        blip2_rows="\n".join(
            f"| {what} | {results['blip2'][key]:.3f} |"
            for key, what in _CAPTION_ROWS.items()
            if key in results["blip2"]
        ),
    )
    write_bytes(path, text.encode())


def folder_bytes(folder: Path) -> int:
    """The total size in bytes of all files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def count_parameters(folder: Path) -> int:
    """The number of parameters in the safetensors files of a folder."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in names)
    return total


def _clip_row(name: str, row: Mapping[str, float]) -> str:
    return f"| {name} | " + " | ".join(f"{row[key]:.3f}" if key in row else "" for key in _CLIP_COLUMNS) + " |"
