"""The frames stage: every k-th decoded frame as a JPEG."""

from stm.layout import dataset_root
from stm.stages.costs import Cost, Workload
from stm.stages.declaration import Files, Stage
from stm.stages.jobs import Job

# Measured on one core of an AMD EPYC (AVX-512): decoding, resizing and JPEG encoding took 1.31 ms per frame at 340x256
# and 5.18 ms at 1280x720; these are the intercept and the slope of the line through both measurements.
DECODE_SECONDS = 9.1e-4
DECODE_SECONDS_PER_PIXEL = 4.64e-9
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
    )


def _cost(job: Job, load: Workload) -> Cost:
    seconds = load.clips * load.frames * (DECODE_SECONDS + DECODE_SECONDS_PER_PIXEL * load.pixels)
    stored = load.clips * load.stored_frames * load.stored_pixels
    return Cost(load.shards, seconds, gigabytes=stored * JPEG_BYTES_PER_PIXEL / 1e9)


FRAMES = Stage(
    name="frames",
    title="sampled frames as JPEGs",
    per=("dataset", "shard"),
    inputs=lambda job: {"slice": job.slice},
    outputs=lambda job: {"tar": job.layout.frames_tar(job.shard), "index": job.layout.frames(job.shard)},
    settings=("frames", "bad_input"),
    resources={"mem_mb": 4000, "runtime": 240},
    processes=True,
    shared=True,
    receipt="index",
    records={"settings": "frames", "policy": "bad_input.policy"},
    cost=_cost,
    run=_run,
)


def frames_of(job: Job) -> Files:
    """Return the inputs of a stage that reads the stored frames."""
    return {"tar": job.layout.frames_tar(job.shard), "frames": job.layout.frames(job.shard)}
