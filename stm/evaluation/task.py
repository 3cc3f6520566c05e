"""What an evaluation task says of itself: its name, its section of the config, the numbers that it writes, its function."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, get_args

from stm.config.evaluation import TaskSettings


@dataclass(frozen=True)
class Metric:
    """A number of `metrics.json`, as tables show it.

    Attributes:
        name: where it stands, keys joined by dots: `top1`, `reranked.text_to_video.r1`.
        label: for people.
        interval: where its 95 % interval stands; None: it has none.
        chance: where the level of chance stands; None: there is none.
        scale: factor between the file and what is shown: 100 for shares.
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
        """The last part of the name, for the columns of tables that machines read: `r1`."""
        return self.name.rpartition(".")[2]

    def read(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """The metric with its value, as `headline` in `metrics.json`.

        Returns:
            `name`, `label`, `value`, `interval` ([low, high] or null), `chance` (or null), `higher_is_better`, `scale` and
            `unit`; value, interval and chance are not scaled.

        Raises:
            KeyError: `metrics` lacks a number that the metric names.
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

    What it needs of a run, which splits it reads and whether it has classes is said by its section of the config, which
    stands below this package.

    Attributes:
        section: its section of the config; the section's `task` is the task's name.
        title: for people, where an evaluation has the task's name.
        metrics: the numbers that tables know more of than that they are shares, the higher the better; the headline first.
        function: `module:name` of what does it: (settings, run, `EvaluationInputs`) -> None. It is imported when it is
            called, so that the declarations stay light.
    """

    section: type[TaskSettings]
    title: str
    metrics: tuple[Metric, ...]
    function: str

    @property
    def name(self) -> str:
        """As in the config, and in `metrics.json`."""
        return str(get_args(self.section.model_fields["task"].annotation)[0])

    @property
    def headline(self) -> Metric:
        """The number that the report shows first."""
        return self.metrics[0]

    def metric(self, name: str) -> Metric:
        """The metric of that name; one that is not declared is a share, the higher the better."""
        return next((metric for metric in self.metrics if metric.name == name), Metric(name, name))

    def load(self) -> Callable[..., None]:
        """The function that does it."""
        module, _, function = self.function.partition(":")
        return getattr(import_module(module), function)


def look_up(metrics: Any, name: str) -> Any:
    """What stands in nested mappings under keys joined by dots.

    Raises:
        KeyError: one of the keys is not there.
    """
    found = metrics
    for key in name.split("."):
        if not isinstance(found, Mapping) or key not in found:
            raise KeyError(name)
        found = found[key]
    return found
