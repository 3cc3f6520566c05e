"""What the page shows, as plain dataclasses. `stm.report.results.collect` fills them from the files."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from stm.config import Config, LanguageRun, PretrainRun
from stm.layout import Layout
from stm.report.names import shown_datasets

T = TypeVar("T")


@dataclass(frozen=True)
class Number:
    """A number of one evaluation as its `metrics.json` tells it; value, interval and chance are not scaled."""

    label: str
    value: float
    interval: tuple[float, float] | None  # 95 %
    chance: float | None
    higher_is_better: bool = True
    scale: float = 100.0  # between the value and what is shown
    unit: str = "%"


@dataclass(frozen=True)
class Measured:
    """One number of a run, from one seed or several."""

    values: Sequence[float]  # one per seed
    interval: tuple[float, float] | None  # 95 % interval of the only seed's, where there is one
    higher_is_better: bool = True
    scale: float = 100.0
    unit: str = "%"
    label: str = ""

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float | None:
        """Standard deviation over the seeds (n - 1); None for a single one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None


def measure_numbers(numbers: Sequence[Number]) -> Measured:
    """One number of one evaluation over seeds, one or more."""
    first = numbers[0]
    interval = first.interval if len(numbers) == 1 else None
    values = [number.value for number in numbers]
    return Measured(values, interval, first.higher_is_better, first.scale, first.unit, first.label)


def best_mean(found: Iterable[Measured]) -> float:
    """The best of the means of one number: the highest, or the lowest where lower is better; NaN when there is none."""
    cells = list(found)
    if not cells:
        return math.nan
    return (max if cells[0].higher_is_better else min)(cell.mean for cell in cells)


@dataclass(frozen=True)
class Split:
    """Clips of a split, from the manifest to the packed shards; None: that stage has no results."""

    name: str
    listed: int
    kept: int | None
    packed: int | None


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of one run."""

    headline: Number
    per_class: Mapping[str, float | None]  # accuracy of each class; None: no test clip has it


@dataclass(frozen=True)
class Run:
    """One instance of a pretraining run: its settings, its loss by step, and its evaluations by name."""

    name: str  # in the config's `runs`
    settings: PretrainRun | LanguageRun
    steps: list[int]
    losses: list[float]
    weights: Path | None
    evaluations: Mapping[str, Evaluation]

    @property
    def mask(self) -> tuple[str, float]:
        return self.settings.mask.strategy, self.settings.mask.ratio

    @property
    def final_loss(self) -> float | None:
        """Mean of the last twentieth of the steps: one step's loss is noise."""
        if not self.losses:
            return None
        tail = self.losses[-max(1, len(self.losses) // 20) :]
        return sum(tail) / len(tail)


@dataclass(frozen=True)
class RunGroup:
    """A run of the config's `pretrain`: its instances, one a seed."""

    name: str
    number: int  # in the config, for its colour
    instances: Sequence[Run]

    @property
    def settings(self) -> PretrainRun | LanguageRun:
        return self.instances[0].settings

    @property
    def mask(self) -> tuple[str, float]:
        return self.instances[0].mask

    @property
    def final_loss(self) -> Measured | None:
        known = [loss for run in self.instances if (loss := run.final_loss) is not None]
        return Measured(known, None, higher_is_better=False, scale=1.0, unit="", label="loss") if known else None

    def score(self, task: str) -> Measured | None:
        """The headline of an evaluation; None when no instance has been evaluated."""
        found = [run.evaluations[task].headline for run in self.instances if task in run.evaluations]
        return measure_numbers(found) if found else None

    def class_accuracy(self, task: str) -> dict[str, float]:
        """Accuracy of each class, the mean over the seeds that have one."""
        found = [run.evaluations[task].per_class for run in self.instances if task in run.evaluations]
        labels = [label for classes in found for label in classes]
        values = {label: [a for classes in found if (a := classes.get(label)) is not None] for label in labels}
        return {label: statistics.fmean(known) if known else math.nan for label, known in values.items()}


def group_runs(config: Config, runs: Iterable[Run]) -> list[RunGroup]:
    """Instances by the run of the config that they belong to, in the config's order."""
    by_name = {run.name: run for run in runs}
    groups = []
    for number, name in enumerate(config.pretrain):
        found = [by_name[instance] for instance in config.instances(name) if instance in by_name]
        groups += [RunGroup(name, number, found)] if found else []
    return groups


@dataclass(frozen=True)
class MaskQualityRow:
    """Share of the true box that a guide's mask hides, 0 to 1."""

    guide: str
    source: str
    camera: str
    ratio: float
    coverage: float
    interval: tuple[float, float] | None
    clips: int
    chance: float
    dataset: str = ""  # named where a config has several

    @property
    def name(self) -> str:
        name = f"{self.guide} ({self.source})" if self.source else self.guide
        return f"{self.dataset}: {name}" if self.dataset else name


@dataclass(frozen=True)
class CaptionSummary:
    """What a caption source yielded."""

    source: str
    clips: int
    captions: int
    distinct: int
    failed: int  # clips without any caption
    examples: list[tuple[str, str]]  # (video id, caption)

    @property
    def failed_share(self) -> float:
        return self.failed / self.clips if self.clips else 0.0


@dataclass(frozen=True)
class Faithfulness:
    """Agreement of masks from cached maps with masks from maps computed on the crop."""

    iou: float
    interval: tuple[float, float]
    chance: float
    crops: int
    ratio: float


@dataclass(frozen=True, order=True)
class Refusal:
    """A clip whose status at a stage is not `ok`; it may have been kept nevertheless."""

    stage: str
    video_id: str
    path: str
    status: str
    policy: str
    detail: str

    @property
    def kept(self) -> bool:
        return self.policy == "keep"


@dataclass
class Results:
    """All that was found of one dataset."""

    shards: list[str] = field(default_factory=list)
    splits: list[Split] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    mask_quality: list[MaskQualityRow] = field(default_factory=list)
    faithfulness: Faithfulness | None = None
    captions: list[CaptionSummary] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def attempt(self, what: str, read: Callable[[], T], missing: T) -> T:
        """`read()`; `missing`, and a line of `problems`, when the file is damaged or of another form."""
        try:
            return read()
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            self.problems.append(f"{what}: {type(error).__name__}: {error}")
            return missing


@dataclass(frozen=True)
class DatasetResults:
    """One dataset of a config: its own config, where its results lie, and what was found there."""

    name: str
    config: Config
    layout: Layout
    results: Results


@dataclass(frozen=True)
class Study:
    """All datasets of a config."""

    config: Config
    datasets: Sequence[DatasetResults]
    own: Results = field(default_factory=Results)  # for problems of what is no dataset's

    @property
    def several(self) -> bool:
        return bool(self.config.datasets)

    @property
    def shown(self) -> list[DatasetResults]:
        """The datasets whose clips are shown."""
        names = shown_datasets(self.config)
        return [dataset for dataset in self.datasets if dataset.name in names]

    @property
    def groups(self) -> list[RunGroup]:
        """All runs, in the config's order."""
        return group_runs(self.config, [run for dataset in self.datasets for run in dataset.results.runs])

    @property
    def mask_quality(self) -> list[MaskQualityRow]:
        return [row for dataset in self.datasets for row in dataset.results.mask_quality]

    @property
    def problems(self) -> list[str]:
        """Each with its dataset's name where there are several."""
        named = [
            (f"{d.name}: " if self.several else "", problem) for d in self.datasets for problem in d.results.problems
        ]
        return [prefix + problem for prefix, problem in named] + self.own.problems
