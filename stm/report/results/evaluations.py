"""Read `metrics.json`: the headline metric for the page, any metric for the config's tables and figures."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from stm.config import Config
from stm.evaluation.tasks import TASKS
from stm.layout import Layout
from stm.report.results.records import Evaluation, Measurement, MetricValue, over_seeds
from stm.storage.files import read_json


class ReportError(ValueError):
    """A result is missing or cannot be shown; the message names the file and the command that creates it."""


def read_measurement(
    config: Config, run: str, task: str, metric: str | None = None, instances: Sequence[str] | None = None
) -> Measurement:
    """Read one metric of an evaluation over the instances of a run.

    Args:
        config: the study's config.
        run: name in the config's `pretrain`.
        task: name in the config's `evaluate`.
        metric: dotted key in metrics.json, such as `top5` or `text_to_video.r1`; None: the headline.
        instances: those to read, at least one; None: all.

    Raises:
        ReportError: an evaluation is missing, cannot be read, or lacks the metric.
    """
    read = _read_seeds(config, run, task, instances)
    return over_seeds([_read_metric(metrics, metric, path) for path, metrics in read])


def read_all_metrics(config: Config, run: str, task: str) -> list[Mapping[str, Any]]:
    """Read the metrics.json of an evaluation for all instances of a run.

    Raises:
        ReportError: as `read_measurement`.
    """
    return [metrics for _, metrics in _read_seeds(config, run, task)]


def _read_seeds(
    config: Config, run: str, task: str, instances: Sequence[str] | None = None
) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    for instance in config.instances(run) if instances is None else instances:
        path = Layout.of(config, config.dataset_of(instance)).evaluate(instance, task) / "metrics.json"
        if not path.exists():
            raise ReportError(f"{path} is missing; run `{_command(instance, task)}`, or the workflow")
        yield path, _read_metrics(path, instance, task)


def read_evaluation(path: Path, instance: str, task: str) -> Evaluation:
    """Read an evaluation's headline and accuracy per class.

    Args:
        path: its `metrics.json`.
        instance: name in the config's `runs`, for the error message.
        task: name in the config's `evaluate`, for the error message.

    Raises:
        ReportError: the headline cannot be read or is missing, as in files from an earlier version.
    """
    metrics = _read_metrics(path, instance, task)
    per_class = {str(label): entry["accuracy"] for label, entry in sorted(metrics.get("per_class", {}).items())}
    return Evaluation(_read_metric(metrics, None, path), per_class)


def _read_metrics(path: Path, instance: str, task: str) -> Mapping[str, Any]:
    metrics = read_json(path)
    if not isinstance(metrics, Mapping) or "headline" not in metrics:
        raise ReportError(
            f"{path} has no headline: an earlier version of stm wrote it; run `{_command(instance, task)}` again"
        )
    return metrics


def _command(instance: str, task: str) -> str:
    return f"stm evaluate --run {instance} --task {task}"


def _read_metric(metrics: Mapping[str, Any], name: str | None, path: Path) -> MetricValue:
    """Read the headline, which the file describes in full, or another metric, described by the task's declaration."""
    headline = metrics["headline"]
    try:
        is_headline = name is None or name == headline["name"]
        entry = headline if is_headline else TASKS[metrics["task"]].metric(str(name)).read(metrics)
        interval = None if entry["interval"] is None else (float(entry["interval"][0]), float(entry["interval"][1]))
        return MetricValue(
            label=str(entry["label"]),
            value=_check_number(entry["value"], entry["name"], path),
            interval=interval,
            chance=None if entry["chance"] is None else float(entry["chance"]),
            higher_is_better=bool(entry["higher_is_better"]),
            scale=float(entry["scale"]),
            unit=str(entry["unit"]),
        )
    except KeyError as error:
        raise ReportError(f"{path} has no {error.args[0]}; it has: {', '.join(sorted(metrics))}") from error


def _check_number(value: Any, name: str, path: Path) -> float:
    if not isinstance(value, int | float):
        raise ReportError(f"{path}: {name} is not a number")
    return float(value)
