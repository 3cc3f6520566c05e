"""The frames stage: every k-th decoded frame, or a number of them spread over the clip, as JPEGs."""

from dataclasses import dataclass
from pathlib import Path

from stm.config import CropComparison
from stm.layout import Layout, dataset_root
from stm.stages.costs import Cost, Workload
from stm.stages.declaration import Files, Stage
from stm.stages.jobs import Job

# Measured on one core of an AMD EPYC (AVX-512): decoding, resizing and JPEG encoding took 1.31 ms per frame at 340x256
# and 5.18 ms at 1280x720; these are the intercept and the slope of the line through both measurements.
DECODE_SECONDS = 9.1e-4
DECODE_SECONDS_PER_PIXEL = 4.64e-9
# Copying the frames of another dataset, checked and through a journal: 8.5 s of one core, measured on 150 clips of 60 frames.
COPY_SECONDS_PER_GIGABYTE = 8.5
# Bytes per pixel of a JPEG at quality 90. Measured on generated clips; real images take 0.1 to 0.3.
JPEG_BYTES_PER_PIXEL = 0.25


def _run(job: Job, inputs: Files, outputs: Files, processes: int) -> None:
    from stm.preprocess.frames.extract import extract_frames

    extract_frames(
        inputs["slice"],
        dataset_root(job.config),
        outputs["tar"],
        outputs["index"],
        job.config.frames,
        job.config.bad_input,
        processes,
        find_lenders(job),
    )


@dataclass(frozen=True)
class Lender:
    """The files of a shard that has the frames: those of the frames stage or, once they were removed, packed ones."""

    slice: Path
    tar: Path
    index: Path
    packed_tar: Path
    packed_index: Path

    @classmethod
    def of(cls, layout: Layout, shard: str) -> "Lender":
        return cls(
            layout.slice(shard),
            layout.frames_tar(shard),
            layout.frames(shard),
            layout.shard_tar(shard),
            layout.shard(shard),
        )


def find_lenders(job: Job) -> list[Lender]:
    """Return all shards of the dataset from which a job's frames are taken; none if all are decoded."""
    name = job.config.frames.from_dataset
    if name is None:
        return []
    return [Lender.of(job.jobs.layouts[name], shard) for shard in job.on(name).shards()]


def _inputs(job: Job) -> Files:
    """Return the slice and, if frames are taken from another dataset, the indexes of all of its shards."""
    # Each index is written together with its tar, and from its slice.
    lenders = find_lenders(job)
    return {"slice": job.slice, "lenders": [lender.index for lender in lenders]} if lenders else {"slice": job.slice}


def _cost(job: Job, load: Workload) -> Cost:
    """Return the cost of decoding, or of copying what another dataset has decoded; the frames may be removed later."""
    gigabytes = load.clips * load.stored_frames * load.stored_pixels * JPEG_BYTES_PER_PIXEL / 1e9
    removed = gigabytes * _share_removed(job, load)
    if job.config.frames.from_dataset is not None:
        return Cost(load.shards, gigabytes * COPY_SECONDS_PER_GIGABYTE, gigabytes=gigabytes, removed=removed)
    seconds = load.clips * load.frames * (DECODE_SECONDS + DECODE_SECONDS_PER_PIXEL * load.pixels)
    return Cost(load.shards, seconds, gigabytes=gigabytes, removed=removed)


def removes_frames(job: Job) -> bool:
    """Whether a shard's frames are removed once it is packed: `frames.keep` is false, and nothing else may read them then."""
    comparison = job.config.crop_comparison
    if not _may_remove(job):
        return False
    return comparison is None or job.shard not in job.shards(comparison.split)[: CropComparison.shards]


def _may_remove(job: Job) -> bool:
    return not job.config.frames.keep and job.config.mask_quality is None


def _share_removed(job: Job, load: Workload) -> float:
    """Return the share of a dataset's frames that is removed, before its shards are known."""
    if not _may_remove(job) or not load.shards:
        return 0.0
    return max(0.0, 1 - (CropComparison.shards / load.shards if job.config.crop_comparison else 0))


FRAMES = Stage(
    name="frames",
    title="sampled frames as JPEGs",
    per=("dataset", "shard"),
    inputs=_inputs,
    outputs=lambda job: {"tar": job.layout.frames_tar(job.shard), "index": job.layout.frames(job.shard)},
    settings=("frames", "bad_input"),
    resources={"mem_mb": 4000, "runtime": 240},
    processes=True,
    shared=True,
    receipt="index",
    records={"settings": "frames", "policy": "bad_input.policy"},
    implied={"every": None, "count": None},
    cost=_cost,
    run=_run,
)


def frames_of(job: Job) -> Files:
    """Return the inputs of a stage that reads the stored frames."""
    return {"tar": job.layout.frames_tar(job.shard), "frames": job.layout.frames(job.shard)}
