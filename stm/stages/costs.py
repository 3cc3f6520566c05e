"""What a stage's work on one dataset costs, as far as that follows from counts and shapes. The plan makes hours of it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Workload:
    """The clips of one dataset: how many, and their mean size."""

    per_split: Mapping[str, int]
    shard_size: int
    frames: float  # per clip, decoded
    stored_frames: float  # per clip
    pixels: float  # of a decoded frame
    stored_pixels: float  # of a stored frame
    cells: int  # of a map

    @property
    def clips(self) -> int:
        return sum(self.per_split.values())

    @property
    def shards(self) -> int:
        return sum(-(-count // self.shard_size) for count in self.per_split.values())

    def of(self, split: str) -> "Workload":
        """One split alone."""
        return replace(self, per_split={split: self.per_split.get(split, 0)})


@dataclass(frozen=True)
class Cost:
    """What all jobs of a stage cost."""

    jobs: int
    core_seconds: float = 0.0
    flops: float | None = None  # of a network, on cores or on a GPU; None: the stage loads none
    gpu_seconds: float = 0.0  # on a GPU, beside what arithmetic takes
    gigabytes: float = 0.0  # written
