"""Rule `generate`: see stm.datasets.moving_shapes.generate.generate."""

from pathlib import Path

from stm.config import MovingShapesDataset
from stm.datasets.moving_shapes.generate import generate
from stm.jobs.progress import log_to

with log_to(snakemake.log[0]):
    generate(
        MovingShapesDataset.model_validate(snakemake.params.dataset),
        seed=snakemake.params.seed,
        folder=Path(snakemake.output.annotations).parent,
        processes=snakemake.threads,
    )
