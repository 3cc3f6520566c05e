"""The declaration of an evaluation task: its name, its section of the config, the metrics that it writes, its function."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, get_args

from stm.config.evaluation import TaskSettings


@dataclass(frozen=True)
class Metric:
    """A number in `metrics.json`, and how tables show it.

    Attributes:
        name: its keys in the file, joined by dots: `top1`, `reranked.text_to_video.r1`.
        label: human-readable name.
        interval: keys of its 95 % interval; None: it has none.
        chance: keys of the level of chance; None: there is none.
        scale: factor from the value in the file to the shown number: 100 for shares.
        unit: of the shown number.
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
        """The last part of the name, for the columns of machine-readable tables: `r1`."""
        return self.name.rpartition(".")[2]

    def read(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """The metric with its value, as `headline` in `metrics.json`.

        Returns:
            `name`, `label`, `value`, `interval` ([low, high] or null), `chance` (or null), `higher_is_better`, `scale` and
            `unit`; value, interval and chance are not scaled.

        Raises:
            KeyError: `metrics` lacks the value, its interval or its chance.
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

    Its section of the config says what it needs of a run, which splits it reads and whether it has classes: stm.config cannot
    import this package.

    Attributes:
        section: its section of the config; the section's `task` is the task's name.
        title: human-readable name, for evaluations that are named after the task.
        metrics: the headline first; any other number in `metrics.json` is shown as a share, the higher the better.
        function: `module:name` of its implementation, (settings, run, `EvaluationInputs`) -> None. It is imported when it is
            called, so that importing the declarations takes no torch.
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
        """The number that the report shows first."""
        return self.metrics[0]

    def metric(self, name: str) -> Metric:
        """The metric with this name; one that is not declared is a share, the higher the better."""
        return next((metric for metric in self.metrics if metric.name == name), Metric(name, name))

    def load(self) -> Callable[..., None]:
        """Imports and returns its implementation."""
        module, _, function = self.function.partition(":")
        return getattr(import_module(module), function)


def look_up(metrics: Any, name: str) -> Any:
    """The value in nested mappings under keys joined by dots.

    Raises:
        KeyError: one of the keys is missing.
    """
    value = metrics
    for key in name.split("."):
        if not isinstance(value, Mapping) or key not in value:
            raise KeyError(name)
        value = value[key]
    return value
