"""Every stage on damaged copies of its input files: it refuses them by name, or its result does not change."""

import json
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packing_inputs import CLIPS, EVERYTHING, GRID, KEEP_GOING, make_inputs, path_of
from small_models import save_clip
from synthetic_videos import make_pan, make_row, make_video, write_slice
from training_shards import make_run
from training_shards import make_shard as make_training_shard
from trial import Stage, Tally, run_here, try_all

import stm.preprocess.clip_outcomes
import stm.preprocess.similarity.score
from stm.config import Augmentation, Flow, Frames, HumanCaptions, LinearProbe, Motion, Similarity, Text
from stm.data.dataset import ClipDataset
from stm.data.geometry import Geometry
from stm.data.loader import ClipLoader
from stm.distributed.process import Process
from stm.evaluation.classification.clips import clips_to_test
from stm.evaluation.features import run_over
from stm.manifest import write_slices
from stm.models.weights import zoo
from stm.models.weights.checks import WeightsError
from stm.preprocess.captions.write import write_captions
from stm.preprocess.flow.estimate import write_flow
from stm.preprocess.frames.extract import extract_frames
from stm.preprocess.motion.measure import extract_motion
from stm.preprocess.packing.pack import pack_shard
from stm.preprocess.similarity.score import write_embeddings, write_similarity
from stm.preprocess.text.encode import write_text
from stm.pretrained.text_encoder import TextEncoder
from stm.shards.check import find_problems

FEW, MANY = 25, 240
HUMAN = HumanCaptions(kind="human")


@pytest.fixture(autouse=True)
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run everything in this process and load each model once, because a test runs a stage hundreds of times."""
    monkeypatch.setattr(stm.preprocess.clip_outcomes, "run_isolated", run_here)
    load = lru_cache(stm.preprocess.similarity.score.load_clip)
    monkeypatch.setattr(stm.preprocess.similarity.score, "load_clip", lambda *arguments: load(*arguments))
    monkeypatch.setattr(TextEncoder, "load", staticmethod(lru_cache(TextEncoder.load)))


def split(folder: Path) -> Stage:
    files = make_inputs(folder / "inputs")
    return Stage(
        "split",
        folder,
        {"manifest": files.slice},
        lambda out: write_slices(files.slice, out / "slices", out / "slices.json", 2),
    )


def _videos(folder: Path) -> Path:
    """Write two videos; return the path of their slice."""
    for name in ("a.mp4", "b.mp4"):
        make_video(folder / "videos" / name, make_pan(frames=16, width=64, height=48))
    return write_slice(folder / "inputs/slice.parquet", [make_row("a.mp4"), make_row("b.mp4", start=0.1, end=0.6)])


def frames(folder: Path) -> Stage:
    (folder / "videos").mkdir()
    slice_path = _videos(folder)
    settings = Frames(every=2, short_side=32, min_side=16)
    run = partial(extract_frames, slice_path, folder / "videos")
    return Stage(
        "frames",
        folder,
        {"slice": slice_path},
        lambda out: run(out / "t.tar", out / "t.parquet", settings, KEEP_GOING, 1),
        tables=("t.parquet",),
    )


def motion(folder: Path) -> Stage:
    (folder / "videos").mkdir()
    slice_path, index = _videos(folder), folder / "inputs/frames.parquet"
    settings = Frames(every=2, short_side=32, min_side=16)
    extract_frames(slice_path, folder / "videos", index.with_suffix(".tar"), index, settings, KEEP_GOING, 1)
    return Stage(
        "motion",
        folder,
        {"slice": slice_path, "frames": index},
        lambda out: extract_motion(
            slice_path, folder / "videos", index, out / "motion.parquet", Motion(), GRID, KEEP_GOING, 1
        ),
        tables=("motion.parquet",),
    )


def flow(folder: Path) -> Stage:
    files = make_inputs(folder / "inputs", CLIPS[:2])
    return Stage(
        "flow",
        folder,
        {"tar": files.tar, "frames": files.index},
        lambda out: write_flow(files.tar, files.index, out / "flow.parquet", Flow(), GRID, KEEP_GOING, 1),
        tables=("flow.parquet",),
    )


def captions(folder: Path) -> Stage:
    files = make_inputs(folder / "inputs")
    return Stage(
        "captions",
        folder,
        {"slice": files.slice, "frames": files.index},
        lambda out: write_captions(files.slice, files.tar, files.index, out / "captions.parquet", HUMAN, KEEP_GOING),
    )


def _similarity(folder: Path, stored: bool) -> Stage:
    files, model = make_inputs(folder / "inputs"), save_clip(folder / "clip")
    settings, captions_path = Similarity(model=f"local-dir:{model}", batch_size=64), path_of(files.folder, "captions")
    inputs = {"frames": files.index, "captions": captions_path}
    embeddings = files.folder / "embeddings.parquet"
    if stored:
        write_embeddings(files.tar, files.index, embeddings, settings, GRID, "cpu")
        inputs["embeddings"] = embeddings
    else:
        inputs["tar"] = files.tar
    run = partial(write_similarity, files.tar, files.index, captions_path)
    more: dict[str, Any] = {"embeddings": embeddings if stored else None, "device": "cpu"}
    return Stage(
        "similarity, stored embeddings" if stored else "similarity",
        folder,
        inputs,
        lambda out: run(out / "similarity.parquet", settings, GRID, KEEP_GOING, **more),
    )


def text(folder: Path) -> Stage:
    files, model = make_inputs(folder / "inputs"), save_clip(folder / "clip")
    settings, captions_path = Text(model=f"local-dir:{model}"), path_of(files.folder, "captions")
    return Stage(
        "text",
        folder,
        {"captions": captions_path},
        lambda out: write_text(captions_path, out / "text.parquet", settings, KEEP_GOING, "cpu"),
    )


def shards(folder: Path) -> Stage:
    files = make_inputs(folder / "inputs")
    parts = ("captions", "similarity", "text")
    tables: dict[str, Any] = {
        part: {source: path_of(files.folder, part, source) for source in EVERYTHING.sources} for part in parts
    }
    inputs = {"slice": files.slice, "tar": files.tar, "frames": files.index, "motion": files.motion, "flow": files.flow}
    inputs |= {part: tables[part]["human"] for part in parts}
    arrays = {**tables, "motion": files.motion, "flow": files.flow}
    run = partial(pack_shard, files.slice, files.tar, files.index, arrays.pop("captions"), arrays)
    return Stage(
        "shards",
        folder,
        inputs,
        lambda out: run(tar=out / "s.tar", index=out / "s.parquet", pack=EVERYTHING, grid=GRID, bad_input=KEEP_GOING),
    )


def _load(indexes: list[Path], output: Path, train: bool) -> None:
    """Write every sample of an epoch to a file."""
    run = make_run()
    dataset = ClipDataset(indexes, Geometry.of(run), run.augmentation if train else Augmentation(), 0, train, text=True)
    parts = []
    for batch in ClipLoader(dataset, 2, shuffle=train).batches(epoch=1):
        parts += [batch["video"].numpy(), batch["text"].numpy(), *(v.numpy() for v in batch["guides"].values())]
        parts.append(np.frombuffer(json.dumps([batch["key"], batch["label"].tolist()]).encode(), np.uint8))
    (output / "samples").write_bytes(b"".join(part.tobytes() for part in parts))


def loader(folder: Path) -> Stage:
    index = make_training_shard(folder / "inputs/train-00000.parquet", ["red", "green", "blue"])
    return Stage(
        "training loader",
        folder,
        {"tar": index.with_suffix(".tar"), "index": index},
        lambda out: _load([index], out, train=True),
        verify=lambda: bool(find_problems(index.with_suffix(".tar"), index)),
        refusals=(ValueError,),
    )


def evaluation(folder: Path) -> Stage:
    index, weights = (
        make_training_shard(folder / "inputs/test-00000.parquet", ["red", "green"]),
        folder / "inputs/weights",
    )
    run = make_run()
    torch.manual_seed(0)
    zoo.save(zoo.build(run), weights)

    def evaluate(output: Path) -> None:
        encoder = zoo.load_encoder(weights).eval()
        clips = clips_to_test(LinearProbe(task="linear"), run, [index], 0)
        features = run_over(encoder.forward_features, clips, Process(0, 1, torch.device("cpu")), what="features")
        np.save(output / "features.npy", features)

    inputs = {"tar": index.with_suffix(".tar"), "index": index, "weights": weights}
    return Stage(
        "evaluation",
        folder,
        inputs,
        evaluate,
        verify=lambda: bool(find_problems(index.with_suffix(".tar"), index)),
        refusals=(ValueError, WeightsError),
    )


STAGES: list[Callable[[Path], Stage]] = [
    split, frames, motion, flow, captions, partial(_similarity, stored=False), partial(_similarity, stored=True), text,
    shards, loader, evaluation,
]  # fmt: skip
NAMES = [
    "split",
    "frames",
    "motion",
    "flow",
    "captions",
    "similarity",
    "stored",
    "text",
    "shards",
    "loader",
    "evaluation",
]


@pytest.mark.parametrize("count", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
@pytest.mark.parametrize("make", STAGES, ids=NAMES)
def test_damaged_files_are_refused_by_name_or_change_nothing(
    make: Callable[[Path], Stage], count: int, tmp_path: Path, table: Callable[[Tally], None]
) -> None:
    tally = try_all(make(tmp_path), count)
    table(tally)
    assert tally.total == count
    assert not tally.wrong, "\n".join(tally.wrong)
