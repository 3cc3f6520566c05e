"""The flow stage: optical flow between stored frames."""

from stm.preprocess.frames.stage import frames_of
from stm.stages.declaration import Files, Stage
from stm.stages.jobs import Job


def _run(job: Job, inputs: Files, outputs: Files, processes: int) -> None:
    from stm.preprocess.flow.estimate import write_flow

    write_flow(
        inputs["tar"],
        inputs["frames"],
        outputs["flow"],
        job.config.flow,
        job.config.grid,
        job.config.bad_input,
        processes,
    )


FLOW = Stage(
    name="flow",
    title="optical flow",
    per=("dataset", "shard"),
    inputs=frames_of,
    models=lambda job: {"model": [job.config.flow.weights]},
    outputs=lambda job: {"flow": job.layout.flow(job.shard)},
    settings=("flow", "grid", "bad_input"),
    resources={"mem_mb": 4000, "runtime": 240},
    processes=True,
    shared=True,
    receipt="flow",
    run=_run,
)
