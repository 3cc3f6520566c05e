"""The flow stage: optical flow between stored frames."""

from stm.preprocess.frames.stage import frames_of
from stm.stages.costs import Cost, Workload, guided_clips
from stm.stages.declaration import Files, Stage
from stm.stages.jobs import Job

# Core seconds of OpenCV's DIS per pixel, both directions. Measured on the same machine as the frames stage: 11.3 ms per frame
# at 340x256 with preset medium; the other presets by the ratios of docs/data.md.
DIS_SECONDS_PER_PIXEL = {"medium": 1.3e-7, "fast": 3.6e-8, "ultrafast": 2.5e-8}
# FLOPs of torchvision's RAFT-small per pixel and direction, counted by torch's FlopCounterMode at 344x256: encoders, and each
# refinement.
RAFT_FLOPS_PER_PIXEL = 24_000
RAFT_FLOPS_PER_REFINEMENT = 27_400


def _run(job: Job, inputs: Files, outputs: Files, processes: int) -> None:
    from stm.preprocess.flow.estimate import write_flow
    from stm.preprocess.frames.removal import restore_frames

    restore_frames(job, processes)
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
    packed = guided_clips(job, load)
    if packed is None:
        return None
    settings, stored = job.config.flow, packed.clips * load.stored_frames
    pixels, gigabytes = stored * load.stored_pixels, stored * load.cells * settings.cells**2 * 8 / 1e9
    if settings.backend == "raft":
        directions = 2 * (RAFT_FLOPS_PER_PIXEL + RAFT_FLOPS_PER_REFINEMENT * settings.iterations)
        return Cost(packed.shards, flops=pixels * directions, gigabytes=gigabytes)
    return Cost(packed.shards, pixels * DIS_SECONDS_PER_PIXEL[settings.preset], gigabytes=gigabytes)


FLOW = Stage(
    name="flow",
    title="optical flow",
    per=("dataset", "shard"),
    inputs=frames_of,
    models=lambda job: {"model": [job.config.flow.weights]},
    outputs=lambda job: {"flow": job.layout.flow(job.shard)},
    settings=("flow", "grid", "bad_input"),
    resources={"mem_mb": 4000, "runtime": 240, "gpu": lambda job: 1 if job.config.flow.backend == "raft" else None},
    processes=True,
    shared=True,
    receipt="flow",
    records={"settings": "flow", "grid": "grid", "policy": "bad_input.policy"},
    cost=_cost,
    run=_run,
)
