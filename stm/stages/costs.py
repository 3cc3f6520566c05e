"""The cost of a stage on one dataset, derived from counts and shapes. The plan converts it to hours."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from stm.config import Config


@dataclass(frozen=True)
class Workload:
    """The number of clips in one dataset, and their mean size."""

    per_split: Mapping[str, int]  # number of clips
    shard_size: int  # clips per shard
    frames: float  # per clip, decoded
    stored_frames: float  # per clip
    pixels: float  # of a decoded frame
    stored_pixels: float  # of a stored frame
    cells: int  # in the map of one frame

    @property
    def clips(self) -> int:
        return sum(self.per_split.values())

    @property
    def shards(self) -> int:
        return sum(-(-count // self.shard_size) for count in self.per_split.values())

    def of(self, split: str) -> "Workload":
        """Return the workload of a single split."""
        return replace(self, per_split={split: self.per_split.get(split, 0)})


def clips_to_process(config: Config, load: Workload, packed: bool) -> Workload | None:
    """Return the clips of a part of the shards: all if it is packed, otherwise those that mask quality is measured on."""
    if packed:
        return load
    return None if config.mask_quality is None else load.of(config.mask_quality.split)


@dataclass(frozen=True)
class Cost:
    """The cost of all jobs of a stage."""

    jobs: int
    core_seconds: float = 0.0
    flops: float | None = None  # of the network, on CPU cores or a GPU; None if the stage runs no network
    precision: str = "float32"  # of the network, as the config names it
    gpu_seconds: float = 0.0  # GPU time in addition to that of `flops`
    gigabytes: float = 0.0  # written to disk
    removed: float = 0.0  # gigabytes of these that are removed during the run
