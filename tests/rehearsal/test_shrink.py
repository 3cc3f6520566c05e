"""The rehearsed config has the structure of the full one, and the listed differences are all that differs."""

from pathlib import Path
from typing import Any

import pytest

from stm.config import Config, load_config, parse_config
from stm.datasets.video_text.tasks import check_tasks
from stm.rehearsal.differences import describe_differences, list_differences, undo_differences
from stm.rehearsal.shrink import place, place_clip, place_model, shrink

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "config").glob("*.yaml"))
# What may differ: sizes, the number of steps, and where data and models are.
SIZES = {"grid", "window", "short_side", "image_size", "width", "features", "hidden", "embedding", "layers", "height"}
SIZES |= {"decoder_depth", "kept_gigabytes", "crops", "clips", "neighbours", "negatives_among", "train", "val", "test"}
STEPS = {"epochs", "warmup_epochs", "batch_size", "accumulate", "iterations", "beams", "max_new_tokens"}
STEPS |= {"max_caption_tokens", "workers", "processes", "nodes", "compile"}
PLACES = {
    "model",
    "root",
    "annotations",
    "partial",
    "init",
    "release",
    "temporal_fusion",
    "results",
    "weights",
    "classes",
}

configs = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)


@configs
def test_every_config_keeps_its_runs_tasks_tables_and_figures(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    full = load_config(path)
    small = shrink(full)
    check_tasks(small)  # the protocols of the benchmarks still hold
    assert list(small.runs) == list(full.runs)
    assert small.evaluations() == full.evaluations()
    assert (small.tables, small.figures, small.report) == (full.tables, full.figures, full.report)
    assert (small.seed, small.seeds, small.dataset_names) == (full.seed, full.seeds, full.dataset_names)
    for name, task in full.evaluate.items():
        assert small.evaluate[name].splits == task.splits
    differences = list_differences(full, small)
    assert {difference.key[-1] for difference in differences} <= SIZES | STEPS | PLACES
    assert parse_config(undo_differences(small, differences)) == full


def tiny(**changes: Any) -> Config:
    run = {"processes": 8, "optimisation": {"batch_size": 512, "accumulate": 4}, "repeats": 2, "workers": 8}
    values = {"name": "own", "dataset": {"source": "folder", "root": "videos"}, "pretrain": {"tube": run}}
    return parse_config({**values, **changes})


def test_a_run_keeps_what_its_processes_gather_in_two_processes_of_two_clips_per_pass() -> None:
    run = shrink(tiny()).pretrain["tube"]
    assert (run.processes, run.optimisation.accumulate, run.repeats) == (2, 2, 2)
    assert run.optimisation.batch_size == 2 * 2 * 2 * 2
    assert (run.model, run.image_size, run.frames, run.mask.ratio) == ("tiny", 64, 16, 0.9)
    untrained = tiny(pretrain={"random": {"optimisation": {"epochs": 0, "warmup_epochs": 0}}})
    assert shrink(untrained).pretrain["random"].optimisation.epochs == 0


def test_the_first_evaluation_of_each_task_keeps_two_processes() -> None:
    tasks: dict[str, Any] = {
        "whole": {"task": "linear"},
        "first": {"task": "linear", "processes": 8},
        "second": {"task": "linear", "processes": 8},
        "tuned": {"task": "finetune", "processes": 4, "optimisation": {"batch_size": 512}},
    }
    small = shrink(tiny(evaluate=tasks)).evaluate
    assert {name: task.processes for name, task in small.items()} == {"whole": 1, "first": 2, "second": 1, "tuned": 2}


def test_a_run_that_starts_from_another_run_starts_from_the_rehearsed_one(tmp_path: Path) -> None:
    results = f"{tmp_path}/results"
    first = f"{results}/own/pretrain/tube/weights.safetensors"
    small = shrink(tiny(results=results, pretrain={"tube": {}, "second": {"init": first}}))
    assert small.pretrain["second"].init == f"{small.results}/own/pretrain/tube/weights.safetensors"
    assert not Path(small.results).is_absolute()


def test_relative_paths_stay_and_all_others_go_to_the_stand_ins() -> None:
    assert place("data/k400/videos") == "data/k400/videos"
    assert place("bert-base-uncased") == "bert-base-uncased"
    assert place("/data/clips") == "stand-ins/data-clips"
    assert place("../clips") == "stand-ins/clips"
    assert place_clip("ViT-B-16-SigLIP@webli") == "local-dir:stand-ins/ViT-B-16-SigLIP-webli"
    assert place_clip("local-dir:stm/assets/demo-clip") == "local-dir:stm/assets/demo-clip"
    assert place_clip("package:demo-clip") == place("package:demo-clip") == "package:demo-clip"
    assert place_model("transformers:package:demo-bert") == "transformers:package:demo-bert"
    assert place_model("actionclip:weights/a.pt") == "actionclip:weights/a.pt"


def test_differences_are_counted_per_kind_of_key() -> None:
    full = tiny(pretrain={"a": {"model": "base"}, "b": {"model": "base"}})
    lines = [line.split() for line in describe_differences(list_differences(full, shrink(full))).splitlines()]
    assert ["pretrain.*.model", "base", "->", "tiny", "(2", "times)"] in lines
