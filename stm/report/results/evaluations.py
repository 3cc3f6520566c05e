"""The one reader of `metrics.json`: its headline for the page, any of its numbers for the tables and figures of a config."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stm.config import Config
from stm.evaluation.tasks import TASKS
from stm.layout import Layout
from stm.report.results.records import Evaluation, Measured, Number, measure_numbers
from stm.storage.files import read_json


class ReportError(ValueError):
    """A result that cannot be shown; the message names the file and what to run."""


def measure(config: Config, run: str, task: str, metric: str | None = None) -> Measured:
    """A number of an evaluation of all instances of a run.

    Args:
        run, task: names in the config's `pretrain` and `evaluate`.
        metric: where it is in metrics.json, such as `top5` or `text_to_video.r1`; None: the headline.

    Raises:
        ReportError: an evaluation is missing or cannot be read, or has no such number.
    """
    found = []
    for instance in config.instances(run):
        path = Layout.of(config, config.dataset_of(instance)).evaluate(instance, task) / "metrics.json"
        if not path.exists():
            raise ReportError(f"{path} is missing; run `{_command(instance, task)}`, or the workflow")
        found.append(_read_number(_read_metrics(path, instance, task), metric, path))
    return measure_numbers(found)


def read_evaluation(path: Path, instance: str, task: str) -> Evaluation:
    """An evaluation as its file tells it.

    Args:
        path: its `metrics.json`.
        instance, task: names in the config's `runs` and `evaluate`, for the message.

    Raises:
        ReportError: the file has no headline, as those of an earlier version, or its headline cannot be read.
    """
    metrics = _read_metrics(path, instance, task)
    per_class = {str(label): found["accuracy"] for label, found in sorted(metrics.get("per_class", {}).items())}
    return Evaluation(_read_number(metrics, None, path), per_class)


def _read_metrics(path: Path, instance: str, task: str) -> Mapping[str, Any]:
    metrics = read_json(path)
    if not isinstance(metrics, Mapping) or "headline" not in metrics:
        raise ReportError(
            f"{path} has no headline: an earlier version of stm wrote it; run `{_command(instance, task)}` again"
        )
    return metrics


def _command(instance: str, task: str) -> str:
    return f"stm evaluate --run {instance} --task {task}"


def _read_number(metrics: Mapping[str, Any], name: str | None, path: Path) -> Number:
    """The headline or another number; how the latter is shown is said by the task's declaration."""
    headline = metrics["headline"]
    try:
        is_headline = name is None or name == headline["name"]
        found = headline if is_headline else TASKS[metrics["task"]].metric(str(name)).read(metrics)
        interval = None if found["interval"] is None else (float(found["interval"][0]), float(found["interval"][1]))
        return Number(
            label=str(found["label"]),
            value=_check_number(found["value"], found["name"], path),
            interval=interval,
            chance=None if found["chance"] is None else float(found["chance"]),
            higher_is_better=bool(found["higher_is_better"]),
            scale=float(found["scale"]),
            unit=str(found["unit"]),
        )
    except KeyError as error:
        raise ReportError(f"{path} has no {error.args[0]}; it has: {', '.join(sorted(metrics))}") from error


def _check_number(value: Any, name: str, path: Path) -> float:
    if not isinstance(value, int | float):
        raise ReportError(f"{path}: {name} is not a number")
    return float(value)
