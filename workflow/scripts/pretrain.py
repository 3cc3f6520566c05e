"""Rule `pretrain`: see stm.training.run_pretraining."""

from pathlib import Path

from stm.config import parse_config
from stm.jobs.progress import log_to
from stm.training.launch import run_pretraining

config = parse_config(snakemake.config)

with log_to(snakemake.log[0]):
    run_pretraining(
        config.runs[snakemake.wildcards.run],
        shard_indexes=[Path(path) for path in snakemake.input.shards],
        output=Path(snakemake.output.weights).parent,
        seed=config.seed,
        image_indexes=[Path(path) for path in snakemake.input.images],
    )
