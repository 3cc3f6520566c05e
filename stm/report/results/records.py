"""Everything the page shows, as plain dataclasses. `stm.report.results.collect` fills them from the files."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from stm.config import Config, LanguageRun, PretrainRun
from stm.layout import Layout
from stm.report.comparison import Entry, Interval
from stm.report.names import shown_datasets
from stm.storage.machine_errors import is_machine_error

T = TypeVar("T")
Curve = tuple[list[int], list[float]]  # steps, ascending, and one value per step

# What metrics.jsonl logs besides the total loss and the losses of the objectives.
NOT_LOSSES = (
    "step",
    "epoch",
    "accuracy",
    "divergence",
    "mix",
    "temperature",
    "gradient_norm",
    "learning_rate",
    "clips_per_second",
)

# The 97.5 % quantiles of Student's t distribution by degrees of freedom, from 1 to 30.
_T_QUANTILES = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


@dataclass(frozen=True)
class MetricValue:
    """One metric value of an evaluation, as stored in its `metrics.json`: value, interval and chance before scaling."""

    label: str
    value: float
    interval: tuple[float, float] | None  # 95 %
    chance: float | None
    higher_is_better: bool = True
    scale: float = 100.0  # factor applied to the value for display
    unit: str = "%"


@dataclass(frozen=True)
class Measurement:
    """One metric of a run, from one seed or several."""

    values: Sequence[float]  # one per seed
    interval: Interval | None  # 95 %, of the mean; see `over_seeds`
    higher_is_better: bool = True
    scale: float = 100.0
    unit: str = "%"
    label: str = ""
    chance: float | None = None

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float | None:
        """Standard deviation over the seeds (n - 1); None for a single seed."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def entry(self, name: str, untrained: bool = False) -> Entry:
        """The measurement as an entry of a column, to be compared with others."""
        return Entry(name, self.mean, self.interval, self.chance, untrained, self.higher_is_better)


def student_quantile(freedom: float) -> float:
    """The 97.5 % quantile of Student's t distribution; above 30 degrees of freedom, that of 30, which is larger.

    Args:
        freedom: degrees of freedom, at least 1; between two integers, the quantile is interpolated over their reciprocals.
    """
    below = min(int(freedom), 30)
    if below == 30 or below == freedom:
        return _T_QUANTILES[below - 1]
    weight = (1 / below - 1 / freedom) * below * (below + 1)
    return (1 - weight) * _T_QUANTILES[below - 1] + weight * _T_QUANTILES[below]


def over_seeds(numbers: Sequence[MetricValue]) -> Measurement:
    """Combine the values of one metric over all seeds.

    The interval of a single seed is that of its evaluation. That of several seeds is Student's t interval of their mean, and
    at least as wide as the evaluations' intervals, on average: seeds that happen to agree share the same test clips.
    """
    first = numbers[0]
    values = [number.value for number in numbers]
    bounds = [number.interval for number in numbers if number.interval is not None]
    if len(numbers) == 1:
        interval = first.interval
    else:
        half = student_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
        low, high = statistics.fmean(values) - half, statistics.fmean(values) + half
        if len(bounds) == len(numbers):
            low = min(low, statistics.fmean(bound[0] for bound in bounds))
            high = max(high, statistics.fmean(bound[1] for bound in bounds))
        interval = (low, high)
    return Measurement(values, interval, first.higher_is_better, first.scale, first.unit, first.label, first.chance)


@dataclass(frozen=True)
class Split:
    """Number of clips of a split in the manifest, after frame extraction, and in the shards; None: no results yet."""

    name: str
    listed: int
    kept: int | None
    packed: int | None


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of one instance of a run."""

    headline: MetricValue
    per_class: Mapping[str, float | None]  # accuracy; None: the class has no test clips


@dataclass(frozen=True)
class Run:
    """One instance (one seed) of a pretraining run: its settings, its loss per step, and its evaluations by name."""

    name: str  # in the config's `runs`
    settings: PretrainRun | LanguageRun
    steps: list[int]
    losses: list[float]
    weights: Path | None
    evaluations: Mapping[str, Evaluation]
    objectives: Mapping[str, Curve] = field(default_factory=dict)  # the logged losses of each objective

    @property
    def mask(self) -> tuple[str, float]:
        return self.settings.mask.strategy, self.settings.mask.ratio

    @property
    def final_loss(self) -> float | None:
        """Mean loss over the last 5 % of the steps, because the loss of a single batch is noisy."""
        if not self.losses:
            return None
        tail = self.losses[-max(1, len(self.losses) // 20) :]
        return sum(tail) / len(tail)


@dataclass(frozen=True)
class RunGroup:
    """A run of the config's `pretrain` with its instances, one per seed."""

    name: str
    number: int  # index in the config; determines its colour
    instances: Sequence[Run]

    @property
    def settings(self) -> PretrainRun | LanguageRun:
        return self.instances[0].settings

    @property
    def mask(self) -> tuple[str, float]:
        return self.instances[0].mask

    @property
    def untrained(self) -> bool:
        """Whether its encoder is random: it has 0 epochs, or trains only a head."""
        return not self.settings.trains_encoder

    @property
    def final_loss(self) -> Measurement | None:
        losses = [loss for run in self.instances if (loss := run.final_loss) is not None]
        return Measurement(losses, None, higher_is_better=False, scale=1.0, unit="", label="loss") if losses else None

    def score(self, task: str) -> Measurement | None:
        """The headline metric of an evaluation; None if no instance has been evaluated."""
        headlines = [run.evaluations[task].headline for run in self.instances if task in run.evaluations]
        return over_seeds(headlines) if headlines else None

    def class_accuracy(self, task: str) -> dict[str, float]:
        """Accuracy per class, averaged over the seeds that report it; NaN if none do."""
        per_seed = [run.evaluations[task].per_class for run in self.instances if task in run.evaluations]
        labels = [label for classes in per_seed for label in classes]
        values = {label: [a for classes in per_seed if (a := classes.get(label)) is not None] for label in labels}
        return {label: statistics.fmean(known) if known else math.nan for label, known in values.items()}


def group_runs(config: Config, runs: Iterable[Run]) -> list[RunGroup]:
    """Group instances by their run in `config.pretrain`, in the config's order; runs without instances are omitted."""
    by_name = {run.name: run for run in runs}
    groups = []
    for number, name in enumerate(config.pretrain):
        instances = [by_name[instance] for instance in config.instances(name) if instance in by_name]
        groups += [RunGroup(name, number, instances)] if instances else []
    return groups


@dataclass(frozen=True)
class MaskQualityRow:
    """Coverage of a guide's masks: the fraction of the object's ground-truth box that they hide, 0 to 1."""

    guide: str
    source: str
    camera: str
    ratio: float
    coverage: float
    interval: tuple[float, float] | None
    clips: int
    chance: float
    dataset: str = ""  # empty if the config has only one dataset

    @property
    def name(self) -> str:
        """The guide and its caption source."""
        return f"{self.guide} ({self.source})" if self.source else self.guide

    def entry(self) -> Entry:
        """The coverage as an entry of a column, to be compared with masks of the same ratio and dataset."""
        return Entry(self.name, self.coverage, self.interval, self.chance)


@dataclass(frozen=True)
class CaptionSummary:
    """Counts and examples of a caption source."""

    source: str
    clips: int
    captions: int
    distinct: int
    failed: int  # clips without a caption
    examples: list[tuple[str, str]]  # (video id, caption)

    @property
    def failed_share(self) -> float:
        return self.failed / self.clips if self.clips else 0.0


@dataclass(frozen=True)
class CropAgreement:
    """Agreement of masks from cached maps with masks from maps recomputed on the crop."""

    iou: float
    interval: tuple[float, float]
    chance: float
    crops: int
    ratio: float
    smaller_iou: float | None = (
        None  # mean over the crops that are clearly smaller than the frame; None if there are none
    )
    smaller_crops: int = 0


@dataclass(frozen=True, order=True)
class Refusal:
    """A clip with a status other than `ok` at some stage; the policy decides whether it is kept."""

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
    """All results of one dataset."""

    shards: list[str] = field(default_factory=list)
    splits: list[Split] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    mask_quality: list[MaskQualityRow] = field(default_factory=list)
    crop_agreement: CropAgreement | None = None
    captions: list[CaptionSummary] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def attempt(self, what: str, read: Callable[[], T], missing: T) -> T:
        """Return `read()`; if the file is damaged or has a different format, add to `problems` and return `missing`.

        The page must be written whatever is broken, because users consult it to find the cause.

        Raises:
            OSError: the disk or the network fails, which says nothing about the file.
        """
        try:
            return read()
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if is_machine_error(error):
                raise
            self.problems.append(f"{what}: {type(error).__name__}: {error}")
            return missing


@dataclass(frozen=True)
class DatasetResults:
    """One dataset of a study: its own config, the layout of its results, and the results."""

    name: str
    config: Config
    layout: Layout
    results: Results

    def own_groups(self, groups: Iterable[RunGroup]) -> list[RunGroup]:
        """Return the study's runs that train on this dataset."""
        names = {run.name for run in self.results.runs}
        return [group for group in groups if group.instances[0].name in names]


@dataclass(frozen=True)
class Study:
    """All results of a config, by dataset."""

    config: Config
    datasets: Sequence[DatasetResults]
    own: Results = field(default_factory=Results)  # collects problems that are not specific to one dataset

    @property
    def several(self) -> bool:
        return bool(self.config.datasets)

    @property
    def shown(self) -> list[DatasetResults]:
        """Datasets whose clips are shown."""
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
        """All problems, prefixed with the dataset's name if there are several datasets."""
        of_datasets = [
            f"{dataset.name}: {problem}" if self.several else problem
            for dataset in self.datasets
            for problem in dataset.results.problems
        ]
        return of_datasets + self.own.problems
