"""The shards stage: pack a shard's frames, captions and maps into one WebDataset tar, with an index."""

from dataclasses import replace
from pathlib import Path

from stm.preprocess.frames.stage import FRAMES, frames_of, removes_frames
from stm.shards.schema import PackedArray
from stm.stages.costs import Cost, Workload
from stm.stages.declaration import Files, Stage
from stm.stages.jobs import Job
from stm.stages.journey import all_stages


def _made_by(job: Job, array: PackedArray) -> tuple[Stage, list[Job]]:
    """Return the stage that writes an array, and its jobs: one in total, or one per packed caption source, in order."""
    jobs = [replace(job, source=source) for source in job.config.pack.sources] if array.per_source else [job]
    return all_stages()[array.name], jobs


def _parts(job: Job) -> Files:
    """Return a job's inputs; a part with one table per caption source is a list in source order."""
    pack, layout, shard = job.config.pack, job.layout, job.shard
    inputs: dict[str, Path | list[Path]] = {"slice": job.slice, **frames_of(job)}
    inputs["captions"] = [layout.captions(source, shard) for source in pack.sources]
    for array in pack.arrays:
        stage, jobs = _made_by(job, array)
        paths = [stage.outputs(source_job)[array.name] for source_job in jobs]
        inputs[array.name] = paths if array.per_source else paths[0]
    return inputs


def _packed(job: Job) -> dict[str, tuple[Stage, Job]]:
    """Return the stage and job of each part, by its name in the receipt's `parts`; see `stm.preprocess.packing.pack`."""
    parts = {"frames": (FRAMES, job)}
    sources = [replace(job, source=source) for source in job.config.pack.sources]
    parts |= {f"captions/{part.source}": (all_stages()["captions"], part) for part in sources}
    for array in job.config.pack.arrays:
        stage, jobs = _made_by(job, array)
        parts |= {f"{array.name}/{part.source}" if array.per_source else array.name: (stage, part) for part in jobs}
    return parts


def _run(job: Job, inputs: Files, outputs: Files, processes: int) -> None:
    from stm.preprocess.frames.removal import remove_frames, restore_frames
    from stm.preprocess.packing.pack import pack_shard

    restore_frames(job, processes)
    pack = job.config.pack
    arrays = {
        array.name: dict(zip(pack.sources, inputs[array.name], strict=True)) if array.per_source else inputs[array.name]
        for array in pack.arrays
    }
    pack_shard(
        inputs["slice"],
        inputs["tar"],
        inputs["frames"],
        dict(zip(pack.sources, inputs["captions"], strict=True)),
        arrays,
        outputs["tar"],
        outputs["index"],
        pack,
        job.config.grid,
        job.config.bad_input,
    )
    if removes_frames(job):
        remove_frames(inputs["tar"])


def _cost(job: Job, load: Workload) -> Cost:
    """Return the size on disk as cost: a shard contains copies of the frames and of all packed maps and vectors."""
    copied = [(FRAMES, [job]), *(_made_by(job, array) for array in job.config.pack.arrays)]
    parts = [stage.cost(one, load) for stage, jobs in copied if stage.cost is not None for one in jobs]
    return Cost(load.shards, load.clips * 0.01, gigabytes=sum(part.gigabytes for part in parts if part is not None))


SHARDS = Stage(
    name="shards",
    title="pack WebDataset shards",
    per=("dataset", "split", "shard"),
    inputs=_parts,
    outputs=lambda job: {
        "tar": job.layout.shard_tar(job.shard, job.split),
        "index": job.layout.shard(job.shard, job.split),
    },
    settings=("pack", "grid", "bad_input"),
    resources={"mem_mb": 4000, "runtime": 120},
    receipt="index",
    parts=_packed,
    records={"settings": "pack", "grid": "grid", "policy": "bad_input.policy"},
    cost=_cost,
    run=_run,
)
