"""The manifest stage (builds the table of a dataset's clips) and the split stage (assigns the clips to shards)."""

from pathlib import Path

from stm.config import ConfigError, FolderDataset
from stm.datasets import build_manifest, check_copy, list_fingerprint, read_copy
from stm.datasets.moving_shapes.stage import GENERATE
from stm.manifest import write_slices
from stm.stages.costs import Cost
from stm.stages.declaration import Files, Stage
from stm.stages.jobs import Job
from stm.stages.journey import missing_models


def annotation_files(job: Job) -> list[Path]:
    """The annotation file of a folder of videos, if it has one. A benchmark's lists are part of `listing`."""
    dataset = job.config.dataset
    return [Path(dataset.annotations)] if isinstance(dataset, FolderDataset) and dataset.annotations else []


def listing(job: Job) -> str:
    """The fingerprint of the dataset's files, computed only if a job needs it and once per call of the workflow."""
    return job.jobs.once(("listing", job.dataset), lambda: list_fingerprint(job.config))


def _sources(job: Job) -> Files:
    generated = GENERATE.applies(job.config)
    return {"annotations": [GENERATE.outputs(job)["annotations"]] if generated else annotation_files(job)}


def _check(job: Job) -> None:
    """Reject what fails after a day before anything runs: an unofficial or incomplete copy, and models that are not there."""
    copy = read_copy(job.config)
    check_copy(job.config, copy)
    # Here, because the lists are read already, and too large to be kept until the settings of the job are needed.
    job.jobs.once(("listing", job.dataset), lambda: list_fingerprint(job.config, copy))
    if missing := job.jobs.once("missing models", lambda: missing_models(job.study)):
        raise ConfigError("models that the config names are not there:\n" + "\n".join(f"  {line}" for line in missing))


def _build(job: Job, inputs: Files, outputs: Files, processes: int) -> None:
    generated = job.layout.generated if GENERATE.applies(job.config) else None
    build_manifest(job.config, generated, outputs["manifest"], outputs["quarantine"], processes)


def _deal(job: Job, inputs: Files, outputs: Files, processes: int) -> str:
    shards = write_slices(inputs["manifest"], job.layout.slices, outputs["index"], job.config.shard_size)
    return "\n".join(shards)


MANIFEST = Stage(
    name="manifest",
    title="the table of clips, and the quarantine",
    per=("dataset",),
    inputs=_sources,
    outputs=lambda job: {"manifest": job.layout.manifest, "quarantine": job.layout.quarantine},
    settings=("dataset", "bad_input", "frames.min_side", "frames.max_side"),
    facts=lambda job: {"listing": listing(job)},
    resources={"mem_mb": 4000, "runtime": 120},
    threads=16,
    processes=True,
    receipt="manifest",
    records={
        "settings.dataset": "dataset",
        "settings.bad_input": "bad_input",
        "settings.min_side": "frames.min_side",
        "settings.max_side": "frames.max_side",
        "seed": "seed",
    },
    check=_check,
    cost=lambda job, load: Cost(1, load.clips * 0.02),
    run=_build,
)

SPLIT = Stage(
    name="split",
    title="assign the clips to shards",
    per=("dataset",),
    inputs=lambda job: {"manifest": job.layout.manifest},
    outputs=lambda job: {"index": job.layout.shard_index},
    settings=("shard_size",),
    receipt="index",
    records={"settings.shard_size": "shard_size"},
    cost=lambda job, load: Cost(1),
    run=_deal,
)
