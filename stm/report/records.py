"""What the page shows, as plain dataclasses. `stm.report.collect` fills them from the files."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from stm.config import PretrainRun

T = TypeVar("T")


@dataclass(frozen=True)
class Split:
    """Clips of a split, from the manifest to the packed shards; None: that stage has no results."""

    name: str
    listed: int
    kept: int | None
    packed: int | None


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of one run. Accuracies are shares from 0 to 1."""

    name: str
    top1: float
    top5: float | None
    interval: tuple[float, float] | None  # 95 % interval of top1
    classes: int
    train_clips: int | None
    test_clips: int | None
    per_class: Mapping[str, float]

    @property
    def chance(self) -> float:
        return 1 / self.classes if self.classes else math.nan


@dataclass(frozen=True)
class Run:
    """One pretraining run: its settings, its loss by step, and its evaluations by name."""

    name: str
    settings: PretrainRun
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

    @property
    def name(self) -> str:
        return f"{self.guide} ({self.source})" if self.source else self.guide


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
    """All that was found."""

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
