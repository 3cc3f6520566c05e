"""Rule `pretrain`: see stm.training.run_pretraining."""

from pathlib import Path

from stm.config import PretrainRun
from stm.progress import log_to
from stm.training.launch import run_pretraining

with log_to(snakemake.log[0]):
    run_pretraining(
        PretrainRun.model_validate(snakemake.params.run),
        shard_indexes=[Path(path) for path in snakemake.input.shards],
        output=Path(snakemake.output.weights).parent,
        seed=snakemake.params.seed,
    )
