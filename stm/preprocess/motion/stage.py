"""The motion stage: motion magnitude and mean vector per cell and stored frame."""

from stm.layout import dataset_root
from stm.stages.costs import Cost, Workload, clips_to_process
from stm.stages.declaration import Files, Stage
from stm.stages.jobs import Job

# Seconds per frame and per pixel of a frame, decoding included, on one core. `mestimate` was measured on the same machine as
# the frames stage, at the same two sizes: 1103 and 255 frames/s. The others differ from it as in one run on generated clips of
# both sizes (`benchmarks/motion.py`: codec 2550 and 463, transcode 571 and 231, mestimate 1081 and 357 frames/s).
MOTION_SECONDS = {"codec": 7.0e-5, "transcode": 1.34e-3, "mestimate": 5.9e-4}
MOTION_SECONDS_PER_PIXEL = {"codec": 3.49e-9, "transcode": 4.46e-9, "mestimate": 3.62e-9}


def _run(job: Job, inputs: Files, outputs: Files, processes: int) -> None:
    from stm.preprocess.motion.measure import extract_motion

    extract_motion(
        inputs["slice"],
        dataset_root(job.config),
        inputs["frames"],
        outputs["motion"],
        job.config.motion,
        job.config.grid,
        job.config.bad_input,
        processes,
    )


def _cost(job: Job, load: Workload) -> Cost | None:
    measured = clips_to_process(job, load, packed=job.config.pack.motion)
    if measured is None:
        return None
    backend = job.config.motion.backend
    seconds = measured.clips * load.frames * (MOTION_SECONDS[backend] + MOTION_SECONDS_PER_PIXEL[backend] * load.pixels)
    return Cost(measured.shards, seconds, gigabytes=measured.clips * load.stored_frames * load.cells * 7 / 1e9)


MOTION = Stage(
    name="motion",
    title="motion maps",
    per=("dataset", "shard"),
    inputs=lambda job: {"slice": job.slice, "frames": job.layout.frames(job.shard)},
    outputs=lambda job: {"motion": job.layout.motion(job.shard)},
    settings=("motion", "grid", "bad_input"),
    resources={"mem_mb": 4000, "runtime": 240},
    processes=True,
    shared=True,
    receipt="motion",
    records={"settings": "motion", "grid": "grid", "policy": "bad_input.policy"},
    cost=_cost,
    run=_run,
)
