"""The frames stage: every k-th decoded frame as a JPEG."""

from stm.layout import dataset_root
from stm.stages.declaration import Files, Stage
from stm.stages.jobs import Job


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
    run=_run,
)


def frames_of(job: Job) -> Files:
    """What stages read that work on the stored frames."""
    return {"tar": job.layout.frames_tar(job.shard), "frames": job.layout.frames(job.shard)}
