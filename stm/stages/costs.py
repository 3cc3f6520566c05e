"""The cost of a stage on one dataset, as far as it follows from counts and shapes. The plan converts it to hours."""

from collections.abc import Mapping
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Workload:
    """The number of clips of one dataset, and their mean size."""

    per_split: Mapping[str, int]  # clips
    shard_size: int  # clips per shard
    frames: float  # per clip, decoded
    stored_frames: float  # per clip
    pixels: float  # of a decoded frame
    stored_pixels: float  # of a stored frame
    cells: int  # of one frame's map

    @property
    def clips(self) -> int:
        return sum(self.per_split.values())

    @property
    def shards(self) -> int:
        return sum(-(-count // self.shard_size) for count in self.per_split.values())

    def of(self, split: str) -> "Workload":
        """The workload of one split alone."""
        return replace(self, per_split={split: self.per_split.get(split, 0)})


@dataclass(frozen=True)
class Cost:
    """The cost of all jobs of a stage."""

    jobs: int
    core_seconds: float = 0.0
    flops: float | None = None  # of a network, on CPU cores or on a GPU; None: the stage runs no network
    gpu_seconds: float = 0.0  # on a GPU, in addition to the arithmetic
    gigabytes: float = 0.0  # written to disk
