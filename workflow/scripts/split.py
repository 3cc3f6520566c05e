"""Checkpoint `split`: see stm.manifest.write_slices."""

from pathlib import Path

from stm.jobs.progress import log_to
from stm.manifest import write_slices

with log_to(snakemake.log[0]):
    write_slices(
        manifest=Path(snakemake.input.manifest),
        folder=Path(snakemake.params.slices),
        index=Path(snakemake.output.index),
        shard_size=snakemake.params.shard_size,
    )
