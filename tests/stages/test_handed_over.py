"""Each stage passes the values of the config, its inputs and its outputs to the function that does the work."""

import inspect
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from stm.config import CropComparison, parse_config
from stm.stages.jobs import Jobs
from stm.stages.journey import all_stages

RUN = {"model": "tiny", "image_size": 32, "patch_size": 8, "frames": 4}
WITH_TEXT = {**RUN, "method": "umt", "teacher": {"model": "local-dir:teacher"}, "language": {"model": "bert"}}
# No value is a default, so that a default in place of the config's value is noticed.
CONFIG: dict[str, Any] = {
    "name": "small",
    "seed": 11,
    "grid": 5,
    "shard_size": 3,
    "dataset": {"source": "moving-shapes", "clips": {"train": 8, "test": 4}, "label": "color"},
    "bad_input": {"max_failure_rate": 0.125},
    "frames": {"short_side": 48},
    "captions": {"manual": {"kind": "human"}, "label": {"kind": "label"}},
    "similarity": {"model": "local-dir:clip", "keep_embeddings": True},
    "text": {"model": "local-dir:text"},
    "motion": {"backend": "codec"},
    "flow": {"cells": 3},
    "pack": {"captions": ["manual", "label"], "text": True, "flow": True},
    "mask_quality": {"text_ratio": 0.5, "crops": 7, "image_size": 64, "patch_size": 8},
    "pretrain": {"tube": {**RUN, "seeds": [5]}, "random": RUN, "umt": WITH_TEXT},
    "evaluate": {
        "linear": {"task": "linear", "runs": ["tube", "random"]},
        "sentences": {"task": "captioning", "runs": ["umt"], "validation_split": "val"},
    },
}
TRACKERS = ("tensorboard", "mlflow")
STUDY = parse_config({**CONFIG, "trackers": list(TRACKERS)})
FAILURES = STUDY.bad_input
# The function that does each stage's work, in the module where the stage looks it up.
WORK = {
    "generate": "datasets.moving_shapes.generate:generate",
    "manifest": "datasets.stage:build_manifest",
    "split": "datasets.stage:write_slices",
    "frames": "preprocess.frames.extract:extract_frames",
    "captions": "preprocess.captions.write:write_captions",
    "embeddings": "preprocess.similarity.score:write_embeddings",
    "joint_similarity": "preprocess.similarity.score:write_joint_similarity",
    "similarity": "preprocess.similarity.score:write_similarity",
    "text": "preprocess.text.encode:write_text",
    "motion": "preprocess.motion.measure:extract_motion",
    "flow": "preprocess.flow.estimate:write_flow",
    "shards": "preprocess.packing.pack:pack_shard",
    "pretrain": "training.launch:run_pretraining",
    "evaluate": "evaluation:evaluate",
    "mask_quality": "evaluation.masks.box_coverage:measure_mask_quality",
    "crop_agreement": "evaluation.masks.crop_agreement:measure_crop_agreement",
}
FRAMES = {"frames_tar": "tar", "frames_index": "frames"}
# The values each function must get. A string is the name of an input of the stage, or else of an output.
EXPECTED: dict[str, dict[str, Any]] = {
    "generate": {"dataset": STUDY.dataset, "seed": 11, "folder": Path("results/small/generated"), "processes": 6},
    "manifest": {"manifest": "manifest", "quarantine": "quarantine", "processes": 6},
    "split": {"manifest": "manifest", "index": "index", "shard_size": 3},
    "frames": {
        **{"slice_path": "slice", "tar": "tar", "index": "index"},
        **{"settings": STUDY.frames, "bad_input": FAILURES, "processes": 6},
    },
    "captions": {
        **FRAMES,
        **{"slice_path": "slice", "output": "captions", "source": STUDY.captions["label"], "bad_input": FAILURES},
    },
    "embeddings": {**FRAMES, "output": "embeddings", "settings": STUDY.similarity, "grid": 5},
    "joint_similarity": {
        **FRAMES,
        "captions": {s: Path(f"results/small/captions/{s}/train-00000.parquet") for s in ("manual", "label")},
        **{"output": "maps", "settings": STUDY.similarity, "grid": 5},
    },
    "similarity": {
        **FRAMES,
        **{"captions": "captions", "embeddings": "embeddings", "output": "similarity"},
        **{"settings": STUDY.similarity, "grid": 5, "bad_input": FAILURES},
    },
    "text": {"captions": "captions", "output": "text", "settings": STUDY.text, "bad_input": FAILURES},
    "motion": {
        **{"slice_path": "slice", "frames_index": "frames", "output": "motion"},
        **{"settings": STUDY.motion, "grid": 5, "bad_input": FAILURES, "processes": 6},
    },
    "flow": {
        **FRAMES,
        **{"output": "flow", "settings": STUDY.flow, "grid": 5, "bad_input": FAILURES, "processes": 6},
    },
    "shards": {
        **FRAMES,
        **{"slice_path": "slice", "tar": Path("results/small/shards/train/train-00000.tar"), "index": "index"},
        **{"pack": STUDY.pack, "grid": 5, "bad_input": FAILURES},
    },
    "pretrain": {
        **{"run": STUDY.runs["random"], "seed": 11, "shard_indexes": "shards", "image_indexes": "images"},
        **{"output": Path("results/small/pretrain/random"), "trackers": TRACKERS},
    },
    "mask_quality": {
        **{"frames_indexes": "frames", "motion": "motion", "truth": "truth", "output": "quality"},
        "similarity": {s: [Path(f"results/small/similarity/{s}/test-00000.parquet")] for s in ("manual", "label")},
        "settings": STUDY.mask_quality,
    },
    "crop_agreement": {
        **{"frames_tars": "tars", "frames_indexes": "frames", "similarity": "similarity", "output": "agreement"},
        **{"settings": STUDY.similarity, "seed": 11},
        # The values of `mask_quality`.
        "comparison": CropComparison(split="test", image_size=64, patch_size=8, crops=7, ratio=0.5),
    },
}
WILDCARDS = {"dataset": "small", "source": "label", "split": "train", "shard": "train-00000", "run": "random"}


def work(name: str, monkeypatch: pytest.MonkeyPatch, **wildcards: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run a stage whose function only records its arguments: these by name, and the stage's inputs and outputs."""
    stage = all_stages()[name]
    jobs = Jobs(STUDY, lambda dataset: ["test-00000", "train-00000", "val-00000"])
    values = {**WILDCARDS, **wildcards}
    job = jobs.make(**{kind: values[kind] for kind in stage.per})
    place, _, function = WORK[name].partition(":")
    module = import_module(f"stm.{place}")
    signature, calls = inspect.signature(getattr(module, function)), []

    def record(*args: Any, **kwargs: Any) -> list[str]:
        calls.append(signature.bind(*args, **kwargs).arguments)
        return []

    monkeypatch.setattr(module, function, record)
    inputs, outputs = stage.inputs(job), stage.outputs(job)
    stage.run(job, inputs, outputs, 6)
    (arguments,) = calls
    return arguments, {**outputs, **inputs}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_stage_passes_on_its_settings_and_files(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, files = work(name, monkeypatch)
    expected = {key: files[value] if isinstance(value, str) else value for key, value in EXPECTED[name].items()}
    assert {key: arguments.get(key) for key in expected} == expected


def test_every_stage_of_the_data_and_of_learning_is_tested() -> None:
    untested = {"plan", "rehearse", "table", "figure", "report", "demo_models"}  # they get the whole config
    assert set(WORK) == set(EXPECTED) | {"evaluate"} == set(all_stages()) - untested


def test_packed_files_stand_under_their_own_caption_source(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, _ = work("shards", monkeypatch)
    assert set(arguments["arrays"]) == {"similarity", "text", "motion", "flow"}
    for part in (arguments["captions"], arguments["arrays"]["similarity"], arguments["arrays"]["text"]):
        assert [(source, path.parent.name) for source, path in part.items()] == [(s, s) for s in ("manual", "label")]


@pytest.mark.parametrize(
    ("run", "task", "seed", "validation"),
    [("random", "linear", 11, []), ("tube-seed5", "linear", 5, []), ("umt", "sentences", 11, ["val-00000"])],
)
def test_an_evaluation_gets_its_splits_and_the_seed_of_its_run(
    run: str, task: str, seed: int, validation: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, _ = work("evaluate", monkeypatch, run=run, task=task)
    given = arguments["inputs"]
    assert given.trackers == TRACKERS
    assert (arguments["task"], arguments["run"]) == (STUDY.evaluate[task], STUDY.runs[run])
    assert (given.seed, given.text, given.output) == (seed, STUDY.text, Path(f"results/small/evaluate/{run}/{task}"))
    assert given.weights == Path(f"results/small/pretrain/{run}/weights.safetensors")
    splits = [[path.stem for path in split] for split in (given.train, given.validation, given.test)]
    assert splits == [["train-00000"], validation, ["test-00000"]]
