"""Declaration of an evaluation task: its name, config section, metrics and implementation."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, get_args

from stm.config.evaluation import TaskSettings


@dataclass(frozen=True)
class Metric:
    """A number in `metrics.json`, and its presentation in tables.

    Attributes:
        name: its path in the file, with keys joined by dots: `top1`, `reranked.text_to_video.r1`.
        label: human-readable name.
        interval: path of its 95 % interval; None if it has none.
        chance: path of its chance level; None if it has none.
        scale: factor from the stored value to the displayed value: 100 for fractions shown in %.
        unit: unit of the displayed value.
    """

    name: str
    label: str
    interval: str | None = None
    chance: str | None = None
    higher_is_better: bool = True
    scale: float = 100.0
    unit: str = "%"

    @property
    def key(self) -> str:
        """The last part of the name, e.g. `r1`: the column name in machine-readable tables."""
        return self.name.rpartition(".")[2]

    def read(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """The metric with its value, as stored under `headline` in `metrics.json`.

        Returns:
            `name`, `label`, `value`, `interval` ([low, high] or null), `chance` (or null), `higher_is_better`, `scale` and
            `unit`; value, interval and chance are not scaled.

        Raises:
            KeyError: `metrics` lacks the value, its interval or its chance level.
        """
        interval = None if self.interval is None else look_up(metrics, self.interval)
        return {
            "name": self.name,
            "label": self.label,
            "value": look_up(metrics, self.name),
            "interval": interval,
            "chance": None if self.chance is None else look_up(metrics, self.chance),
            "higher_is_better": self.higher_is_better,
            "scale": self.scale,
            "unit": self.unit,
        }


@dataclass(frozen=True)
class Task:
    """An evaluation task.

    Its config section declares what it needs from a run, which splits it reads and whether it has classes, because
    stm.config cannot import this package.

    Attributes:
        section: its config section, whose field `task` is the task's name.
        title: human-readable name, for evaluations that are named after the task.
        metrics: the headline first; any undeclared number in `metrics.json` is shown as a percentage, where
            higher is better.
        function: `module:name` of its implementation, (settings, run, `EvaluationInputs`, `Process`) -> None. It is imported on
            first use, so that importing the declarations does not import torch.
    """

    section: type[TaskSettings]
    title: str
    metrics: tuple[Metric, ...]
    function: str

    @property
    def name(self) -> str:
        """The task's name in the config and in `metrics.json`."""
        return str(get_args(self.section.model_fields["task"].annotation)[0])

    @property
    def headline(self) -> Metric:
        """The metric that the report shows first."""
        return self.metrics[0]

    def metric(self, name: str) -> Metric:
        """The metric with this name; an undeclared metric is a fraction, where higher is better."""
        return next((metric for metric in self.metrics if metric.name == name), Metric(name, name))

    def load(self) -> Callable[..., None]:
        """Imports and returns the task's implementation."""
        module, _, function = self.function.partition(":")
        return getattr(import_module(module), function)


def look_up(metrics: Any, name: str) -> Any:
    """Looks up a value in nested mappings by a path of keys joined by dots.

    Raises:
        KeyError: one of the keys is missing.
    """
    value = metrics
    for key in name.split("."):
        if not isinstance(value, Mapping) or key not in value:
            raise KeyError(name)
        value = value[key]
    return value
