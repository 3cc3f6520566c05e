"""Accuracy per class over seeds."""

import math
from typing import Any

from stm.config import PretrainRun
from stm.report.results.records import Evaluation, MetricValue, Run, RunGroup


def test_a_class_s_accuracy_is_the_mean_over_the_seeds_that_report_it() -> None:
    seeds: list[dict[str, Any]] = [{"a": 0.4, "b": 0.5, "c": None}, {"a": 0.8, "c": None}, {"a": 0.9, "b": None}]
    headline = MetricValue("top-1", 0.5, None, None)
    runs = [
        Run(str(n), PretrainRun(), [], [], None, {"linear": Evaluation(headline, own)}) for n, own in enumerate(seeds)
    ]
    runs.append(Run("not evaluated", PretrainRun(), [], [], None, {}))
    found = RunGroup("any", 0, runs).class_accuracy("linear")
    assert math.isclose(found["a"], 0.7) and found["b"] == 0.5 and math.isnan(found["c"])
