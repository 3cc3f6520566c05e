"""The generate stage, which renders the clips of moving-shapes."""

from stm.config import MovingShapesDataset
from stm.stages.costs import Cost, Workload
from stm.stages.declaration import Files, Stage
from stm.stages.jobs import Job


def _run(job: Job, inputs: Files, outputs: Files, processes: int) -> None:
    from stm.datasets.moving_shapes.generate import generate

    dataset = job.config.dataset
    assert isinstance(dataset, MovingShapesDataset)
    generate(dataset, job.config.seed, outputs["annotations"].parent, processes)


def _cost(job: Job, load: Workload) -> Cost | None:
    dataset = job.config.dataset
    if not isinstance(dataset, MovingShapesDataset):
        return None
    pixels = dataset.frames * dataset.width * dataset.height  # all of them, also those that `frames` leaves out
    return Cost(1, load.clips * pixels * 4e-8, gigabytes=load.clips * 5e-5)


GENERATE = Stage(
    name="generate",
    title="generate the clips of moving-shapes",
    per=("dataset",),
    outputs=lambda job: {
        "annotations": job.layout.generated / "annotations.parquet",
        "truth": job.layout.generated / "truth.parquet",
    },
    settings=("dataset", "seed"),
    threads=16,
    processes=True,
    receipt="truth",
    records={"settings": "dataset", "seed": "dataset.seed"},
    applies=lambda config: isinstance(config.dataset, MovingShapesDataset),
    otherwise="dataset.source is not moving-shapes: there is nothing to generate",
    cost=_cost,
    run=_run,
)
