"""Runs over seeds and datasets: accuracy per class, and which runs compete."""

import math
from pathlib import Path
from typing import Any

from report_study import make_several_config

from stm.config import PretrainRun
from stm.report.results.records import Evaluation, MetricValue, Run, RunGroup, group_runs
from stm.report.tables import bold_runs, compare_runs, results_table


def test_a_class_s_accuracy_is_the_mean_over_the_seeds_that_report_it() -> None:
    seeds: list[dict[str, Any]] = [{"a": 0.4, "b": 0.5, "c": None}, {"a": 0.8, "c": None}, {"a": 0.9, "b": None}]
    headline = MetricValue("top-1", 0.5, None, None)
    runs = [
        Run(str(n), PretrainRun(), [], [], None, {"linear": Evaluation(headline, own)}) for n, own in enumerate(seeds)
    ]
    runs.append(Run("not evaluated", PretrainRun(), [], [], None, {}))
    found = RunGroup("any", 0, runs).class_accuracy("linear")
    assert math.isclose(found["a"], 0.7) and found["b"] == 0.5 and math.isnan(found["c"])


def test_runs_compete_only_on_the_same_dataset(tmp_path: Path) -> None:
    """Each is evaluated by `linear` on its own dataset, and by `transfer` on a third one."""
    config = make_several_config(tmp_path)
    scores = {
        "text": MetricValue("top-1", 0.9, (0.85, 0.95), 0.25),
        "tube": MetricValue("top-1", 0.5, (0.45, 0.55), 0.25),
    }
    runs = [
        Run(name, config.runs[name], [], [], None, dict.fromkeys(config.evaluate, Evaluation(score, {})))
        for name, score in scores.items()
    ]
    groups = group_runs(config, runs)
    compared = {task: compare_runs(config, groups, task) for task in config.evaluate}
    names = {
        task: {dataset: [entry.name for entry in entries] for dataset, entries in by_dataset.items()}
        for task, by_dataset in compared.items()
    }
    assert names == {"linear": {"near": ["text"], "far": ["tube"]}, "transfer": {"unused": ["text", "tube"]}}
    assert (bold_runs(config, groups, "linear"), bold_runs(config, groups, "transfer")) == (set(), {"text"})
    table = results_table(config, groups, {})
    assert [[cell.bold for cell in row[-2:]] for row in table.rows] == [[False, True], [False, False]]
