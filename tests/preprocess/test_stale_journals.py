"""A job reuses the results of a killed attempt, unless its settings or inputs have changed.

For each stage with a journal: one attempt does all its work and dies before it clears its journal; then a second one runs in
the same folder with one setting or input changed. It must write the same bytes as in a folder without a journal.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from small_models import save_blip2, save_clip, save_language_model, save_text_encoder
from small_vlms import save_vlm
from stage_outputs import Clip, make_stage_outputs
from synthetic_videos import make_pan, make_row, make_video, write_slice
from torchvision.models.optical_flow import raft_small

import stm.datasets
from stm.config import (
    BadInput,
    Blip2Captions,
    Flow,
    Frames,
    HumanCaptions,
    LabelCaptions,
    LanguageModelCaptions,
    Motion,
    MovingShapesDataset,
    Section,
    Similarity,
    Text,
    VisionLanguageCaptions,
    parse_config,
)
from stm.datasets.moving_shapes.generate import generate
from stm.datasets.probe import probe_file
from stm.jobs.journal import Journal
from stm.preprocess.captions.write import write_captions
from stm.preprocess.clip_outcomes import run_shard
from stm.preprocess.flow.estimate import write_flow
from stm.preprocess.frames.extract import extract_frames
from stm.preprocess.motion.measure import extract_motion
from stm.preprocess.similarity.score import write_embeddings, write_joint_similarity, write_similarity
from stm.preprocess.text.encode import write_text
from stm.storage.files import sha256_file
from stm.storage.tables import read_table, write_table

KEEP_GOING = BadInput(max_failure_rate=1.0)
Values = Mapping[str, Any]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos and models, two of each kind, named one and two."""
    folder = tmp_path_factory.mktemp("world")
    for number, name in enumerate(("one", "two"), 1):
        (folder / name).mkdir()
        make_video(folder / name / "clip.mp4", make_pan(12, 2 * number, 1, 96, 64))
        save_clip(folder / name / "clip", seed=number)
        save_blip2(folder / name / "blip2", seed=number)
        save_language_model(folder / name / "llm", seed=number)
        save_vlm(folder / name / "vlm", "qwen2_5_vl", seed=number)
        save_text_encoder(folder / name / "bert", "bert", seed=number)
        torch.manual_seed(number)
        torch.save(raft_small(weights=None).state_dict(), folder / name / "raft.pth")
    make_video(folder / "tall.mp4", make_pan(6, 2, 1, 66, 70))
    return folder


def settings_of(kind: type[Section], values: Values) -> Any:
    """The config section of a stage, from those values that are its keys."""
    return kind.model_validate({name: value for name, value in values.items() if name in kind.model_fields})


def slice_in(world: Path, folder: Path, values: Values) -> Path:
    """A slice of one clip, a part of the video that `values` name."""
    file = world / values["video"] / "clip.mp4"
    facts = {"bytes": file.stat().st_size, "sha256": sha256_file(file)}
    row = make_row("clip.mp4", start=values["start"], end=values["end"], **facts)
    return write_slice(folder / "train-00000.parquet", [row])


def run_frames(world: Path, folder: Path, values: Values) -> None:
    rows, root = slice_in(world, folder, values), world / values["video"]
    if "count" in values:  # which replaces the step
        values = {name: value for name, value in values.items() if name != "every"}
    extract_frames(
        rows, root, folder / "out.tar", folder / "out.parquet", settings_of(Frames, values), KEEP_GOING, processes=1
    )


def run_motion(world: Path, folder: Path, values: Values) -> None:
    rows, root, index = slice_in(world, folder, values), world / values["video"], folder / "frames.parquet"
    frames = Frames(every=values["every"], short_side=64)
    extract_frames(rows, root, folder / "frames.tar", index, frames, KEEP_GOING, processes=1)
    stored = read_table(index)
    resized = [{**row, "width": values["stored_width"]} for row in stored.to_pylist()]
    write_table(index, pa.Table.from_pylist(resized, stored.schema), {})
    settings = settings_of(Motion, values)
    extract_motion(rows, root, index, folder / "out.parquet", settings, values["grid"], KEEP_GOING, processes=1)


def run_flow(world: Path, folder: Path, values: Values) -> None:
    made = make_stage_outputs(folder / "shard", [Clip("a", width=values["width"])], seed=values["pictures"])
    settings = settings_of(Flow, values)
    if settings.weights is not None:
        settings = settings.model_copy(update={"weights": str(world / settings.weights)})
    write_flow(
        made.tar, made.index, folder / "out.parquet", settings, values["grid"], KEEP_GOING, processes=1, device="cpu"
    )


def write_shard(folder: Path, values: Values) -> tuple[Path, Path, Path]:
    """Slice, tar and index of two clips."""
    clips = [
        Clip("a", frames=4, captions=values.get("said"), label=values.get("label", "circle")),
        Clip("b", frames=2, captions=["a blue square"]),
    ]
    made = make_stage_outputs(folder / "shard", clips, seed=values.get("pictures", 0))
    return made.slice, made.tar, made.index


def run_captions(world: Path, folder: Path, values: Values) -> None:
    kinds: dict[str, type[Section]] = {"blip2": Blip2Captions, "llm": LanguageModelCaptions}
    kinds["vlm"] = VisionLanguageCaptions
    source = settings_of(kinds[values["kind"]], {**values, "model": str(world / values["model"])})
    rows, tar, index = write_shard(folder, values)
    if "pace" in values:  # seconds between stored frames
        stored = read_table(index)
        timed = [{**row, "pts": [values["pace"] * i for i in range(row["frames"])]} for row in stored.to_pylist()]
        write_table(index, pa.Table.from_pylist(timed, stored.schema), {})
    write_captions(rows, tar, index, folder / "out.parquet", source, KEEP_GOING, device="cpu")


def run_embeddings(world: Path, folder: Path, values: Values) -> None:
    _, tar, index = write_shard(folder, values)
    write_embeddings(tar, index, folder / "out.parquet", similarity(world, values), values["grid"], device="cpu")


def run_similarity(world: Path, folder: Path, values: Values) -> None:
    rows, tar, index = write_shard(folder, values)
    captions, chosen = folder / "captions.parquet", similarity(world, values)
    write_captions(rows, tar, index, captions, HumanCaptions(kind="human"), KEEP_GOING)
    write_similarity(tar, index, captions, folder / "out.parquet", chosen, values["grid"], KEEP_GOING, device="cpu")


def run_joint_similarity(world: Path, folder: Path, values: Values) -> None:
    rows, tar, index = write_shard(folder, values)
    captions = {"human": folder / "human.parquet", "label": folder / "label.parquet"}
    write_captions(rows, tar, index, captions["human"], HumanCaptions(kind="human"), KEEP_GOING)
    write_captions(rows, tar, index, captions["label"], LabelCaptions(kind="label"), KEEP_GOING)
    chosen, output = similarity(world, values), folder / "out.parquet"
    write_joint_similarity(tar, index, captions, output, chosen, values["grid"], device="cpu")


def similarity(world: Path, values: Values) -> Similarity:
    chosen: Similarity = settings_of(Similarity, {**values, "model": f"local-dir:{world / values['model']}"})
    return chosen


def run_text(world: Path, folder: Path, values: Values) -> None:
    captions = folder / "captions.parquet"
    write_captions(*write_shard(folder, values), captions, HumanCaptions(kind="human"), KEEP_GOING)
    settings = settings_of(Text, {**values, "model": f"transformers:{world / values['model']}"})
    write_text(captions, folder / "out.parquet", settings, KEEP_GOING, device="cpu")


def run_manifest(world: Path, folder: Path, values: Values) -> None:
    videos = folder / "videos"
    videos.mkdir(exist_ok=True)
    shutil.copy2(world / values["video"] / "clip.mp4", videos / "clip.mp4")
    shutil.copy2(world / "tall.mp4", videos / "tall.mp4")
    config = {
        "name": "any",
        "dataset": {"source": "folder", "root": str(videos)},
        "frames": {name: values[name] for name in ("min_side", "max_side")},
        "bad_input": KEEP_GOING.model_dump(mode="json"),
    }
    manifest, quarantine = folder / "out.parquet", folder / "out.quarantine.parquet"
    stm.datasets.build_manifest(parse_config(config), None, manifest, quarantine, processes=1)


def run_generate(world: Path, folder: Path, values: Values) -> None:
    dataset = settings_of(MovingShapesDataset, {**values, "source": "moving-shapes", "seed": None})
    generate(dataset, values["seed"], folder / "out", processes=1)


@dataclass(frozen=True)
class Stage:
    """How a stage is run, and what its bytes depend on."""

    run: Callable[[Path, Path, Values], None]
    section: type[Section]
    base: Values  # settings and inputs of the attempt that dies
    changes: Values  # another value per key, with which the results differ
    same: Values = field(default_factory=dict)  # keys that change no result of these small inputs, and why


ROUNDING = "rounding alone, and none here"
CLIP_PART = {"video": "one", "start": None, "end": None}
SHARD = {"said": ["a red circle", "what moves"], "pictures": 0}
SMALL_SHAPES = {"clips": {"train": 1}, "frames": 8, "fps": 8, "height": 64, "width": 64, "distractors": 4}

STAGES = {
    "frames": Stage(
        run_frames,
        Frames,
        {"every": 4, "short_side": 64, **CLIP_PART},
        {
            **{"every": 2, "count": 2, "short_side": 48, "quality": 30, "min_frames": 5, "max_frames": 2},
            **{"min_side": 65, "max_side": 80, "video": "two", "start": 0.2, "end": 0.2},
        },
    ),
    "motion": Stage(
        run_motion,
        Motion,
        {"backend": "transcode", "grid": 4, "every": 4, "stored_width": 96, **CLIP_PART},
        {
            **{"backend": "mestimate", "subtract_camera": True, "grid": 5, "every": 3, "stored_width": 64},
            **{"video": "two", "start": 0.1, "end": 0.3},
        },
    ),
    "flow, DIS": Stage(
        run_flow,
        Flow,
        {"grid": 4, "width": 40, "pictures": 0},
        {"preset": "ultrafast", "cells": 1, "grid": 5, "width": 48, "pictures": 1},
        {"backend": "see RAFT", "weights": "see RAFT", "iterations": "RAFT's"},
    ),
    "flow, RAFT": Stage(
        run_flow,
        Flow,
        {"backend": "raft", "weights": "one/raft.pth", "iterations": 2, "grid": 4, "width": 128, "pictures": 0},
        {"backend": "dis", "weights": "two/raft.pth", "iterations": 1, "cells": 1, "grid": 5, "pictures": 1},
        {"preset": "of DIS"},
    ),
    "captions, BLIP-2": Stage(
        run_captions,
        Blip2Captions,
        {"kind": "blip2", "model": "one/blip2", "max_new_tokens": 6, "key_frames": 2, **SHARD},
        {"model": "two/blip2", "max_new_tokens": 4, "key_frames": 1, "beams": 3, "pictures": 1},
        {"batch_size": ROUNDING, "precision": ROUNDING, "kind": "another stage"},
    ),
    "captions, LLM": Stage(
        run_captions,
        LanguageModelCaptions,
        {"kind": "llm", "model": "one/llm", "max_new_tokens": 6, **SHARD},
        {"model": "two/llm", "max_new_tokens": 4, "prompts": ["describe the {}"], "label": "square"},
        {"batch_size": ROUNDING, "precision": ROUNDING, "kind": "another stage"},
    ),
    "captions, VLM": Stage(
        run_captions,
        VisionLanguageCaptions,
        {"kind": "vlm", "model": "one/vlm", "max_new_tokens": 16, "frames": 4, "pace": 0.25, **SHARD},
        {
            **{
                "model": "two/vlm",
                "max_new_tokens": 4,
                "frames": 3,
                "prompts": ["describe the video"],
                "input": "images",
            },
            **{"template": {"thinking": True}, "processor": {"size": {"shortest_edge": 3136, "longest_edge": 12544}}},
            **{"pace": 9.0, "pictures": 1},
        },
        {
            **{"batch_size": ROUNDING, "precision": ROUNDING, "kind": "another stage"},
            "revision": "a folder has none",
        },
    ),
    "embeddings": Stage(
        run_embeddings,
        Similarity,
        {"model": "one/clip", "grid": 3, **SHARD},
        {"model": "two/clip", "precision": "bfloat16", "grid": 4, "window": 2, "method": "dense", "pictures": 1},
        {"batch_size": ROUNDING, "compile": ROUNDING},
    ),
    "joint similarity": Stage(
        run_joint_similarity,
        Similarity,
        {"model": "one/clip", "grid": 3, **SHARD},
        {"model": "two/clip", "method": "dense", "said": ["a red square", "what moves"], "label": "square"},
        {
            **{"precision": "as in similarity", "window": "as in similarity"},
            **{"batch_size": ROUNDING, "compile": ROUNDING},
        },
    ),
    "similarity": Stage(
        run_similarity,
        Similarity,
        {"model": "one/clip", "grid": 3, **SHARD},
        {
            **{"model": "two/clip", "precision": "bfloat16", "grid": 4, "window": 2, "method": "dense", "pictures": 1},
            "said": ["a red square", "what moves"],
        },
        {"batch_size": ROUNDING, "compile": ROUNDING},
    ),
    "text": Stage(
        run_text,
        Text,
        {"model": "one/bert", "pooling": "mean", **SHARD},
        {"model": "two/bert", "pooling": "cls", "precision": "bfloat16", "said": ["what moves", "a red circle"]},
        {"batch_size": ROUNDING},
    ),
    "manifest": Stage(
        run_manifest,
        Section,
        {"video": "one", "min_side": 32, "max_side": 1000},
        {"video": "two", "min_side": 65, "max_side": 80},
    ),
    "generate": Stage(
        run_generate,
        MovingShapesDataset,
        {**SMALL_SHAPES, "seed": 0, "moving_camera": 1.0},
        {
            **{"frames": 9, "fps": 9, "height": 66, "width": 66, "distractors": 0, "seed": 1, "moving_camera": 0.0},
            **{"label": "color", "clips": {"train": 2}, "caption": "action", "object_size": [0.2, 0.5]},
            **{"background_context": 1.0, "companion": 0.5, "moving_background": 1.0, "camera_amplitude": [0.3, 0.3]},
        },
        {"source": "another stage"},
    ),
}
CASES = [(stage, key) for stage in STAGES for key in STAGES[stage].changes]


@pytest.mark.parametrize("name", STAGES)
def test_every_setting_that_decides_is_changed_here(name: str) -> None:
    stage = STAGES[name]
    fingerprinted = set(stage.section.model_fields) - set(stage.section.cache_neutral)
    assert fingerprinted <= {*stage.changes, *stage.same}, (
        "name the new key in STAGES, with a value that changes the results"
    )


@pytest.fixture(scope="module", autouse=True)
def in_this_process() -> Iterator[None]:
    """Process clips in this process: starting workers takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(run_shard.__globals__, "run_isolated", run_here)
        patch.setattr(stm.datasets, "probe_files", probe_here)
        yield


def run_here(function: Callable[[Any], Any], tasks: Sequence[Any], *_: Any) -> Iterator[tuple[int, Any]]:
    return ((number, function(task)) for number, task in enumerate(tasks))


def probe_here(paths: Sequence[Path], settings: Mapping[str, int], *_: Any) -> Iterator[tuple[Path, dict[str, Any]]]:
    return ((path, probe_file(path, **settings)) for path in paths)


@dataclass(frozen=True)
class Killed:
    """An attempt that has finished every clip and was killed before it cleared its journal."""

    folder: Path
    contents: dict[str, Any]  # the outputs' contents; Snakemake removes the outputs themselves


@pytest.fixture(scope="module")
def kill(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Killed]:
    @cache
    def kill(name: str) -> Killed:
        folder = tmp_path_factory.mktemp("killed")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Journal, "close", lambda self: None)
            STAGES[name].run(world, folder, STAGES[name].base)
        items = [path for path in folder.rglob(".*.journal/*") if path.name != "lock"]
        assert items, "nothing was finished, so nothing can be reused"
        found = contents(folder)
        for path in folder.glob("out.*"):
            path.unlink()
        return Killed(folder, found)

    return kill


def outputs(folder: Path) -> list[Path]:
    found = [*folder.glob("out.*"), *folder.rglob("out/**/*")]
    return sorted(path for path in found if path.is_file() and not path.parent.name.endswith(".journal"))


def contents(folder: Path) -> dict[str, Any]:
    """Contents of the outputs without their receipts."""
    found: dict[str, Any] = {}
    for path in outputs(folder):
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".parquet":
            found[name] = repr(read_table(path).to_pylist())
        elif path.name != "made.json":
            found[name] = path.read_bytes()
    return found


@pytest.mark.parametrize("name", STAGES)
def test_an_attempt_with_nothing_changed_uses_all_that_is_there(
    name: str, world: Path, kill: Callable[[str], Killed], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(kill(name).folder, tmp_path / "again")
    put: list[str] = []
    monkeypatch.setattr(Journal, "put", lambda self, item, data: put.append(item))
    STAGES[name].run(world, tmp_path / "again", STAGES[name].base)
    assert contents(tmp_path / "again") == kill(name).contents
    assert not put


@pytest.mark.parametrize(("name", "key"), CASES)
def test_a_journal_of_other_settings_or_inputs_is_not_used(
    name: str, key: str, world: Path, kill: Callable[[str], Killed], tmp_path: Path
) -> None:
    stage, stale, clean = STAGES[name], tmp_path / "stale", tmp_path / "clean"
    values = {**stage.base, key: stage.changes[key]}
    shutil.copytree(kill(name).folder, stale)
    clean.mkdir()
    stage.run(world, stale, values)
    stage.run(world, clean, values)
    made = {path.relative_to(clean).as_posix(): path.read_bytes() for path in outputs(clean)}
    for file, data in made.items():
        assert (stale / file).read_bytes() == data, file
    assert not list(stale.rglob(".*.journal")), "the journal must be removed at the end"
    assert contents(clean) != kill(name).contents, "the change must alter the results, or the test proves nothing"
