"""The pretrain stage: one run of `pretrain`, with one seed."""

from collections.abc import Sequence
from pathlib import Path

from stm.config import LanguageRun, PretrainRun
from stm.stages.declaration import Files, Stage
from stm.stages.jobs import Job
from stm.training.launch import request_gpus


def weights_of(job: Job, run: str) -> Path:
    """The path of the weights of a run in `Config.runs`."""
    return job.on(job.study.dataset_of(run)).layout.weights(run)


def _settings(job: Job) -> PretrainRun | LanguageRun:
    return job.study.runs[job.run]


def _joined(job: Job, sources: Sequence[tuple[str | None, str]]) -> list[Path]:
    """The packed shards of all (dataset, split) pairs that a run trains on; a dataset of None is the run's own."""
    return [path for name, split in sources for path in job.on(name).packed(split)]


def _starts_from_run(job: Job) -> bool:
    """Whether the run is initialised from another run, which must be trained first."""
    init = _settings(job).init
    return init is not None and Path(init) in {weights_of(job, name) for name in job.study.runs}


def _inputs(job: Job) -> Files:
    run = _settings(job)
    shards = {"shards": _joined(job, run.video_sources), "images": _joined(job, run.image_sources)}
    init = {"init": [Path(str(run.init))]} if _starts_from_run(job) else {}
    return shards | init | {"masks": [Path(file) for file in run.mask_files]}


def _models(job: Job) -> dict[str, list[str | None]]:
    run = _settings(job)
    init = None if _starts_from_run(job) else run.init
    return {"init": [init], "release": [run.release], "teacher": list(run.models)}


def _run(job: Job, inputs: Files, outputs: Files, processes: int) -> None:
    from stm.training.launch import run_pretraining

    run_pretraining(
        _settings(job),
        inputs["shards"],
        outputs["weights"].parent,
        job.study.seed,
        image_indexes=inputs["images"],
        trackers=job.study.trackers,
    )


PRETRAIN = Stage(
    name="pretrain",
    title="pretrain the runs of the config",
    per=("dataset", "run"),
    inputs=_inputs,
    runs=lambda job: [job.run],
    models=_models,
    outputs=lambda job: {
        "weights": job.layout.weights(job.run),
        "config": job.layout.pretrain(job.run) / "config.json",
    },
    settings=("runs.{run}", "seed"),
    # Threads and memory are per node.
    resources={
        "mem_mb": lambda job: 16000 * (1 + _settings(job).processes),
        "runtime": 2880,
        **request_gpus(_settings),
    },
    # The cores are divided among the runs: small models get slower with more threads, but parallel runs do not.
    threads=lambda job, cores: max(1, cores // max(1, len(job.study.runs)), _settings(job).processes),
    receipt="config",
    hashed=lambda job: {"data": _inputs(job)["shards"] + _inputs(job)["images"]},
    records={"settings": "runs.{run}", "seed": "runs.{run}.seed"},
    run=_run,
)
