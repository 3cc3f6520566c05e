"""The generate stage: the clips of moving-shapes."""

from stm.config import MovingShapesDataset
from stm.stages.declaration import Files, Stage
from stm.stages.jobs import Job


def _run(job: Job, inputs: Files, outputs: Files, processes: int) -> None:
    from stm.datasets.moving_shapes.generate import generate

    dataset = job.config.dataset
    assert isinstance(dataset, MovingShapesDataset)
    generate(dataset, job.config.seed, outputs["annotations"].parent, processes)


GENERATE = Stage(
    name="generate",
    title="make the clips of moving-shapes",
    per=("dataset",),
    outputs=lambda job: {
        "annotations": job.layout.generated / "annotations.parquet",
        "truth": job.layout.generated / "truth.parquet",
    },
    settings=("dataset", "seed"),
    threads=16,
    processes=True,
    receipt="truth",
    applies=lambda config: isinstance(config.dataset, MovingShapesDataset),
    otherwise="dataset.source is not moving-shapes: there is nothing to generate",
    run=_run,
)
