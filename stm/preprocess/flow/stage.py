"""The flow stage: optical flow between stored frames."""

from stm.preprocess.frames.stage import frames_of
from stm.stages.costs import Cost, Workload
from stm.stages.declaration import Files, Stage
from stm.stages.jobs import Job

# Measured on the same machine as the frames stage: OpenCV's DIS with preset medium took 11.3 ms per frame at 340x256
# for both directions.
FLOW_SECONDS_PER_PIXEL = 1.3e-7


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


def _cost(job: Job, load: Workload) -> Cost | None:
    if not job.config.pack.flow:
        return None
    stored = load.clips * load.stored_frames
    gigabytes = stored * load.cells * job.config.flow.cells**2 * 8 / 1e9
    return Cost(load.shards, stored * FLOW_SECONDS_PER_PIXEL * load.stored_pixels, gigabytes=gigabytes)


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
    records={"settings": "flow", "grid": "grid", "policy": "bad_input.policy"},
    cost=_cost,
    run=_run,
)
