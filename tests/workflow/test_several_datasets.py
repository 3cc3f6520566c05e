"""A config with several datasets: each has its own results folder, and tables and figures are targets by name."""

import csv
import json
import re
from pathlib import Path

import pytest
import yaml
from recorded_runs import finish
from small_workflow import CLIPS, RUN, STAGES, snakemake

pytestmark = pytest.mark.slow

SHAPES = {**CLIPS, "clips": {"train": 12, "test": 8}}
TGM = {**RUN, "dataset": "shapes"}
CONFIG = {
    **STAGES,
    "name": "paper",
    "seeds": [0, 1],
    "datasets": {
        "shapes": {"dataset": SHAPES},
        "colors": {
            "dataset": {**SHAPES, "label": "color", "seed": 1, "clips": {"train": 24, "test": 8}},
            "pack": {"captions": None, "similarity": False, "motion": False, "flow": False, "text": False},
        },
    },
    "pretrain": {
        "tgm": TGM,
        "tracks": {**TGM, "mask": {"strategy": "flow", "ratio": 0.5}, "contrast": None, "seeds": [0]},
    },
    "evaluate": {
        "linear": {"task": "linear", "dataset": "colors", "epochs": 2, "learning_rates": [0.01]},
        "retrieval": {"task": "retrieval", "source": "human"},
        "zero": {"task": "zero_shot", "dataset": "colors", "runs": ["tgm"]},
    },
    "tables": {
        "paper_table1": {
            "title": "Colors",
            "columns": [
                {"title": "Linear", "task": "linear"},
                {"title": "R@1", "task": "retrieval", "metric": "text_to_video.r1"},
            ],
            "rows": [
                {"label": "TGM", "runs": "tgm", "paper": [50.0, None]},
                {"label": "Tracks", "runs": ["tracks", None]},
            ],
        }
    },
    "figures": {
        "paper_figure1": {"title": "Masks", "kind": "clips", "runs": {"TGM": "tgm", "Tracks": "tracks"}, "clips": 1},
        "paper_figure2": {"title": "Contrast", "kind": "losses", "metric": "contrast", "runs": {"TGM": "tgm"}},
    },
    "report": {"clips": 1},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("several")
    (path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    return path


def test_a_table_is_a_target_that_makes_all_it_needs_and_no_more(folder):
    snakemake(folder, "paper_table1")
    results = folder / "results"
    with (results / "paper/tables/paper_table1.csv").open() as file:
        tgm, tracks = csv.DictReader(file)
    metrics = [
        json.loads((results / f"shapes/evaluate/tgm-seed{seed}/linear/metrics.json").read_text()) for seed in (0, 1)
    ]
    assert float(tgm["linear_mean"]) == pytest.approx(sum(m["top1"] for m in metrics) / 2)
    assert (tgm["linear_seeds"], tgm["linear_paper"], tracks["r_1_mean"]) == ("2", "50", "")
    assert {m["train_clips"] for m in metrics} == {24}, "the probe learns from the other dataset's clips"
    assert not (results / "colors/captions").exists(), "a dataset that packs no captions needs none"
    assert not (results / "shapes/evaluate/tgm-seed0/zero").exists()


def test_the_whole_config_ends_in_one_page_and_then_there_is_nothing_to_do(folder):
    snakemake(folder)
    page = (folder / "results/paper/report.html").read_text()
    for word in ("Colors", "Masks", "Contrast", "shapes", "colors", "±"):
        assert word in page
    for name in ("paper_figure1", "paper_figure2"):
        assert (folder / f"results/paper/figures/{name}.png").stat().st_size > 5000
    zero = json.loads((folder / "results/shapes/evaluate/tgm-seed0/zero/metrics.json").read_text())
    assert zero["task"] == "zero_shot" and zero["test_clips"] == 8
    assert "Nothing to be done" in snakemake(folder)


def test_another_seed_trains_that_seed_alone(folder):
    snakemake(folder, "paper_table1")  # the tests above may have run in another process
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG | {"seeds": [0, 1, 2]}))
    printed = snakemake(folder, "--dry-run", "paper_table1")
    assert printed.count("rule pretrain:") == 1  # seed 2 of the only run with several seeds
    assert "rule frames:" not in printed and "rule shards:" not in printed


def test_a_lost_run_is_trained_again_from_the_shards_of_other_datasets_than_the_evaluation_reads(tmp_path):
    """All datasets are split already, and each is met by a job that another one's split brings."""
    for name in ("lender", "borrower"):
        (tmp_path / f"{name}.csv").write_text("path,label\n0.mp4,one\n")
    (tmp_path / "videos").mkdir()
    files = {"source": "folder", "root": "videos"}
    packs = {"pack": {"captions": None, "similarity": False, "motion": False, "flow": False, "text": False}}
    datasets = {
        "shapes": {"dataset": SHAPES},
        "lender": {"dataset": {**files, "annotations": "lender.csv"}, **packs},
        "borrower": {
            "dataset": {**files, "annotations": "borrower.csv"},
            "frames": {"from_dataset": "lender"},
            **packs,
        },
    }
    linear = {"task": "linear", "dataset": "borrower", "epochs": 2, "learning_rates": [0.01]}
    values = {**STAGES, "name": "paper", "datasets": datasets, "pretrain": {"tgm": TGM}, "evaluate": {"linear": linear}}
    finish(tmp_path, values)
    target, train = "results/shapes/evaluate/tgm/linear/metrics.json", "train-00000.parquet"
    packed = f"results/borrower/shards/train/{train}"
    for lost in (target, "results/shapes/pretrain/tgm/weights.safetensors", packed, f"results/borrower/frames/{train}"):
        (tmp_path / lost).unlink()
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    printed = snakemake(tmp_path, "--dry-run", target)
    assert "<TBD>" not in printed
    inputs = dict(re.findall(r"^(?:local)?rule (\w+):\n +input: (.*)", printed, re.M))
    assert f"results/lender/frames/{train}" in inputs["frames"]
    assert f"results/shapes/shards/train/{train}" in inputs["pretrain"]


def test_a_wrong_copy_of_a_benchmark_is_said_before_anything_runs(folder, tmp_path):
    lists, videos = tmp_path / "lists", tmp_path / "videos"
    lists.mkdir()
    videos.mkdir()
    (lists / "classInd.txt").write_text("1 Archery\n")
    (lists / "trainlist01.txt").write_text("Archery/v_Archery_g08_c01.avi 1\n")
    (lists / "testlist01.txt").write_text("Archery/v_Archery_g01_c01.avi\n")
    dataset = {"source": "ucf101", "root": str(videos), "annotations": str(lists)}
    broken = {
        **CONFIG,
        "datasets": {
            **CONFIG["datasets"],
            "colors": {"dataset": dataset, "pack": CONFIG["datasets"]["colors"]["pack"]},
        },
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(broken))
    printed = snakemake(tmp_path, "paper_table1", fails=True)
    assert "9,537" in printed or "9537" in printed
    assert "rule generate:" not in printed and not (tmp_path / "results/shapes/generated").exists()
    assert "official" in snakemake(tmp_path, "plan")
