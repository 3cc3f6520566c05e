"""The motion stage: motion magnitude and mean vector per cell and stored frame."""

from stm.layout import dataset_root
from stm.stages.declaration import Files, Stage
from stm.stages.jobs import Job


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
    run=_run,
)
