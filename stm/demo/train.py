"""Trains the demo's small CLIP and BLIP-2, evaluates them on held-out clips, and writes their model card."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import torch
from transformers import Blip2ForConditionalGeneration, Blip2Processor

from stm.demo.blip2 import build_model, build_processor, describe_frames, save_blip2, train_blip2
from stm.demo.card import write_card
from stm.demo.clip import build_clip, save_clip, train_clip, write_config
from stm.demo.frames import HELD_OUT_SPLIT, TRAIN_SPLIT, Frame, all_captions, render_frames
from stm.demo.measure import measure_captions, measure_ceiling, measure_clip
from stm.demo.recipe import Recipe
from stm.storage.files import write_bytes

FRAMES_PER_CLIP = 2


def train_demo_models(
    clip_output: Path,
    blip2_output: Path,
    card: Path,
    seed: int = 0,
    threads: int = 2,
    clip_steps: int = Recipe.clip_steps,
    blip2_steps: int = Recipe.blip2_steps,
    clips: int = Recipe.clips,
    held_out_clips: int = Recipe.held_out_clips,
) -> dict[str, Any]:
    """Train the small CLIP, then the small BLIP-2 from CLIP's image tower; takes about 30 minutes on a CPU.

    The outputs are replaced only after both models are trained and evaluated.

    Args:
        clip_output: folder for open_clip's `local-dir:`.
        blip2_output: folder for `Blip2ForConditionalGeneration.from_pretrained` and `Blip2Processor.from_pretrained`.
        card: output Markdown file that documents how the models were trained, and their metrics.

    Returns:
        The contents of the card: the metrics of `clip` and `blip2`, the numbers of `frames`, and the `seconds` per phase.
    """
    recipe = Recipe(clips, held_out_clips, clip_steps, blip2_steps, seed, threads)
    seconds: dict[str, float] = {}
    previous_threads = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with tempfile.TemporaryDirectory() as folder:
            clip, blip2 = Path(folder) / "clip", Path(folder) / "blip2"
            results = _train(recipe, clip, blip2, seconds)
            _move(clip, clip_output)
            _move(blip2, blip2_output)
    finally:
        torch.set_num_threads(previous_threads)
    write_card(card, recipe, results, seconds, (clip_output, blip2_output))
    return {**results, "seconds": seconds}


def _train(recipe: Recipe, clip: Path, blip2: Path, seconds: dict[str, float]) -> dict[str, Any]:
    def timed(phase: str, work: Callable[[], Any]) -> Any:
        start = time.monotonic()
        result = work()
        seconds[phase] = time.monotonic() - start
        return result

    train, test = timed("render", lambda: _render(recipe))
    timed("clip", lambda: _make_clip(recipe, train, clip))
    timed("blip2", lambda: _make_blip2(recipe, train, clip, blip2))
    # The saved files are loaded through the public loaders, so that the card describes exactly what a user loads.
    results = timed("measure", lambda: {"clip": evaluate_clip(clip, test), "blip2": evaluate_blip2(blip2, test)})
    return {**results, "frames": {"train": len(train), "held_out": len(test)}}


def _render(recipe: Recipe) -> tuple[list[Frame], list[Frame]]:
    return (
        render_frames(TRAIN_SPLIT, recipe.clips, FRAMES_PER_CLIP, recipe.seed, recipe.threads),
        render_frames(HELD_OUT_SPLIT, recipe.held_out_clips, FRAMES_PER_CLIP, recipe.seed, recipe.threads),
    )


def _make_clip(recipe: Recipe, frames: list[Frame], folder: Path) -> None:
    write_config(folder)
    model, tokenize = build_clip(folder, recipe.seed)
    train_clip(model, tokenize, frames, recipe.clip_steps, recipe.seed)
    save_clip(model, folder)


def _make_blip2(recipe: Recipe, frames: list[Frame], clip: Path, folder: Path) -> None:
    tower = open_clip.create_model(f"local-dir:{clip}").visual
    processor = build_processor(all_captions())
    model = build_model(processor.tokenizer, tower, recipe.seed)
    train_blip2(model, processor, frames, recipe.blip2_steps, recipe.seed)
    save_blip2(model, processor, folder)


def evaluate_clip(folder: Path, frames: list[Frame]) -> dict[str, dict[str, float]]:
    """Metrics of a saved CLIP with full and with appearance captions, and their upper bound, `ceiling`."""
    model = open_clip.create_model(f"local-dir:{folder}").eval()
    tokenize = open_clip.get_tokenizer(f"local-dir:{folder}")
    return {
        "caption": measure_clip(model, tokenize, frames, lambda frame: frame.caption),
        "appearance": measure_clip(model, tokenize, frames, lambda frame: frame.appearance),
        "ceiling": measure_ceiling(frames),
    }


def evaluate_blip2(folder: Path, frames: list[Frame]) -> dict[str, float]:
    """Metrics of the greedy captions of a saved BLIP-2."""
    model = Blip2ForConditionalGeneration.from_pretrained(folder).eval()
    return measure_captions(describe_frames(model, Blip2Processor.from_pretrained(folder), frames), frames)


def _move(source: Path, target: Path) -> None:
    """Replace each file of `target` atomically with that of `source`, and delete all other files."""
    names = {path.name for path in source.iterdir()}
    for path in sorted(source.iterdir()):
        write_bytes(target / path.name, path.read_bytes())
    for path in target.iterdir():
        if path.name not in names:
            path.unlink()
