"""The cost of a stage on one dataset, derived from counts and shapes. The plan converts it to hours."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import inf

from stm.stages.jobs import Job


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

    def first(self, shards: Callable[[str], float]) -> "Workload | None":
        """Return the workload of the first shards of each split, whose number `shards` returns; None if they have no clips."""
        limits = {split: min(count, shards(split) * self.shard_size) for split, count in self.per_split.items()}
        per_split = {split: int(count) for split, count in limits.items() if count}
        return replace(self, per_split=per_split) if per_split else None


def guided_clips(job: Job, load: Workload) -> Workload | None:
    """Return the clips of the shards of which something reads captions or guides; None if there are none."""
    return load.first(lambda split: job.jobs.guided_shards(job.dataset, split))


def clips_to_process(job: Job, load: Workload, packed: bool) -> Workload | None:
    """Return the clips of a part of the shards: those with guides if it is packed, or those that mask quality is measured on."""
    if packed:
        return guided_clips(job, load)
    quality = job.config.mask_quality
    return None if quality is None else load.first(lambda split: inf if split == quality.split else 0)


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
