"""Results folders of larger configs: several seeds, contrast, retrieval, a teacher, tables, figures, several datasets."""

import json
from pathlib import Path
from typing import Any

import torch
from report_results import RUN, SPLITS, TEXT_WIDTH, make_config, make_headline, write_offline

from stm.config import Config, parse_config
from stm.layout import Layout
from stm.methods import build_method
from stm.storage.files import write_json
from stm.storage.receipts import make_receipt
from stm.training.pretraining import write_weights

ROOT = Path(__file__).parents[2]

CONTRAST = {"contrast": {"weight": 1.0, "hidden": 8}}

# Top-1 accuracy per seed: tube's mean is 0.5 and its deviation 0.1, text's are 0.8 and 0.02.
TOP1 = {
    "tube-seed0": 0.4, "tube-seed1": 0.5, "tube-seed2": 0.6,
    "text-seed0": 0.78, "text-seed1": 0.80, "text-seed2": 0.82,
    "attentive-seed0": 0.3, "attentive-seed1": 0.3, "attentive-seed2": 0.3,
    "scratch-seed0": 0.1, "scratch-seed1": 0.2, "scratch-seed2": 0.3,
}  # fmt: skip


def make_study_config(root: Path, **changes: Any) -> Config:
    """Four runs with three seeds each, two of them with contrast."""
    values: dict[str, Any] = {
        "seeds": [0, 1, 2],
        "pack": {"captions": "human", "text": True, "flow": True},
        "pretrain": {
            "tube": {**RUN, "mask": {"strategy": "tube", "ratio": 0.75}},
            "text": {**RUN, **CONTRAST, "mask": {"strategy": "text_top", "ratio": 0.5}, "captions": {"count": 1}},
            "attentive": {
                **RUN,
                **CONTRAST,
                "mask": {"strategy": "attention", "ratio": 0.75},
                "teacher": {"model": f"local-dir:{ROOT}/stm/assets/demo-clip"},
            },
            "scratch": {**RUN, "optimisation": {"epochs": 0}, "mask": {"strategy": "tube", "ratio": 0.75}},
        },
        "evaluate": {
            "linear": {"task": "linear"},
            "zero_shot": {"task": "zero_shot", "runs": ["text"]},
            "retrieval": {"task": "retrieval", "runs": ["text", "attentive"]},
        },
        "tables": {
            "main": {
                "title": "Masks & <more>",
                "columns": [
                    {"title": "Linear", "task": "linear"},
                    {"title": "Text to video, R@1", "task": "retrieval", "metric": "text_to_video.r1"},
                    {"title": "Median rank", "task": "retrieval", "metric": "text_to_video.median_rank"},
                ],
                "rows": [
                    {"label": "Tube", "runs": ["tube", None, None], "paper": [66.6, None, None]},
                    {"label": "Text", "runs": "text", "paper": [67.5, 12.0, None], "certainty": ["source", None, None]},
                ],
                "certainty": "second_hand",
                "note": "Numbers of a <paper>.",
            }
        },
        "figures": {
            "pictures": {
                "title": "What is hidden",
                "kind": "clips",
                "runs": {"Tube": "tube", "Text": "text", "Attention": "attentive", "Untrained": "scratch"},
                "show": ["frames", "similarity", "masks", "reconstructions", "attention"],
                "clips": 2,
            },
            "curves": {
                "title": "Contrast",
                "kind": "losses",
                "metric": "contrast",
                "runs": {"Text": "text", "Attention": "attentive"},
            },
            "heights": {"title": "Bars", "kind": "bars", "tasks": ["linear"], "runs": {"Tube": "tube", "Text": "text"}},
        },
        "report": {"title": "A made study", "clips": 2},
    }
    return make_config(root, **{**values, **changes})


def make_several_config(root: Path, **changes: Any) -> Config:
    """Three datasets, a run on each of the first two, and an evaluation of both on the third."""
    values: dict[str, Any] = {
        "name": "both",
        "results": str(root),
        "grid": 4,
        "frames": {"every": 2, "short_side": 32},
        "captions": {"human": {"kind": "human"}},
        "pack": {"captions": "human", "text": True},
        "datasets": {
            "near": {"dataset": {"source": "moving-shapes", "clips": SPLITS}, "mask_quality": {"split": "test"}},
            "far": {
                "dataset": {"source": "moving-shapes", "clips": SPLITS},
                "pack": {"similarity": False, "text": False},
            },
            "unused": {
                "dataset": {"source": "moving-shapes", "clips": SPLITS},
                "pack": {"captions": None, "similarity": False, "motion": False, "text": False},
            },
        },
        "pretrain": {
            "text": {**RUN, "dataset": "near", "mask": {"strategy": "text_top", "ratio": 0.5}},
            "tube": {**RUN, "dataset": "far", "mask": {"strategy": "tube", "ratio": 0.75}},
        },
        "evaluate": {"linear": {"task": "linear"}, "transfer": {"task": "linear", "dataset": "unused"}},
        "tables": {
            "both": {
                "title": "Both",
                "columns": [{"title": "Own", "task": "linear"}, {"title": "Other", "task": "transfer"}],
                "rows": [{"label": "Text", "runs": "text"}, {"label": "Tube", "runs": "tube"}],
            }
        },
        "figures": {
            "masks-of-both": {"title": "Clips", "kind": "clips", "clips": 1, "runs": {"A": "text", "B": "tube"}}
        },
        "report": {"title": "Two datasets", "clips": 1},
    }
    return parse_config({**values, **changes})


def write_runs(config: Config) -> None:
    """Weights, losses and evaluations of every instance of every run."""
    for number, (instance, run) in enumerate(config.runs.items()):
        layout = Layout.of(config, config.dataset_of(instance))
        torch.manual_seed(number)
        method = build_method(run.model_copy(update={"teacher": None, "mask": config.runs[next(iter(config.runs))].mask}),
                              TEXT_WIDTH)  # fmt: skip
        write_weights(method, layout.pretrain(instance) / "weights.safetensors")
        lines = [{"step": s, "loss": 1 / s + number, "contrast": 2 / s + number} for s in range(1, 21)]
        kept = lines[: 20 * min(1, run.optimisation.epochs)]
        (layout.pretrain(instance) / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    for instance, task in config.evaluations():
        path = Layout.of(config, config.dataset_of(instance)).evaluate(instance, task) / "metrics.json"
        write_json(path, make_metrics(config, instance, task))


def make_metrics(config: Config, instance: str, task: str) -> dict[str, Any]:
    share, kind = TOP1.get(instance, 0.5), config.evaluate[task].task
    if kind == "retrieval":
        figures = {"r1": share / 2, "r5": share, "r10": 1.0, "median_rank": 10 * share, "mean_rank": 3.0}
        bounds = {"r1": [share / 2 - 0.1, share / 2 + 0.1]}
        headline = make_headline("text_to_video.r1", "text-to-video R@1", share / 2, bounds["r1"], 1 / 8)
        directions = {"text_to_video": figures, "video_to_text": figures, "queries": 16, "clips": 8}
        intervals = {"text_to_video": bounds, "video_to_text": bounds}
        return {"task": kind, "headline": headline, **directions, "confidence95": intervals, "chance": {"r1": 1 / 8}}
    classes = {"slides right": {"clips": 3, "correct": 2, "accuracy": share}, "spins": {"clips": 0, "accuracy": None}}
    interval = [share - 0.1, share + 0.1]
    return {
        "task": kind, "headline": make_headline("top1", "top-1", share, interval, 1 / 4), "top1": share, "top5": 1.0,
        "classes": 4, "train_clips": 3, "test_clips": 5, "confidence95": interval, "chance": 1 / 4, "per_class": classes,
        "receipt": make_receipt("evaluate", {}, ["torch"]),
    }  # fmt: skip


def make_study(root: Path, **changes: Any) -> Config:
    """Write a complete results folder of one dataset; return its config."""
    config = make_study_config(root, **changes)
    write_offline(Layout.of(config), config)
    write_runs(config)
    return config


def make_several(root: Path) -> Config:
    """Write a complete results folder of several datasets; return its config."""
    config = make_several_config(root)
    for name in config.dataset_names:
        layout = Layout.of(config, name)
        write_offline(layout, config.of(name))
        write_cost(layout, "frames", 10.0)
    rows = [{"guide": "text", "source": "human", "camera": "fixed", "ratio": 0.6, "coverage": 0.9, "low": 0.85,
             "high": 0.95, "clips": 3, "chance": 0.6}]  # fmt: skip
    write_json(Layout.of(config, "near").mask_quality, {"rows": rows})
    write_runs(config)
    stages = [
        {
            "stage": "frames/near",
            "jobs": 2,
            "cpu_hours": 0.01,
            "gpu_hours": 0.0,
            "gigabytes": 0.1,
            "loading_hours": 0.0,
        },
        {"stage": "frames/far", "jobs": 3, "cpu_hours": 0.02, "gpu_hours": 0.0, "gigabytes": 0.1, "loading_hours": 0.0},
        {
            "stage": "pretrain/text",
            "jobs": 1,
            "cpu_hours": 2.0,
            "gpu_hours": 0.1,
            "gigabytes": 0.0,
            "loading_hours": 0.5,
        },
    ]
    write_json(Layout.of(config).plan, {"name": "both", "datasets": {}, "stages": stages})
    return config


def write_cost(layout: Layout, rule: str, seconds: float) -> None:
    """A benchmark file of one job."""
    path = layout.benchmarks / rule / "all.tsv"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"s\th:m:s\tmax_rss\tcpu_time\n{seconds}\t0:00:10\t100.0\t{seconds}\n")
