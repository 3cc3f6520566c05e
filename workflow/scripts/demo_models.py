"""Rule `demo_models`: see stm.demo.train.train_demo_models."""

from pathlib import Path

from stm.demo.bert import make_demo_bert
from stm.demo.train import train_demo_models
from stm.jobs.progress import log_to

with log_to(snakemake.log[0]):
    train_demo_models(
        clip_output=Path(snakemake.output.clip),
        blip2_output=Path(snakemake.output.blip2),
        card=Path(snakemake.output.card),
        seed=snakemake.params.seed,
        threads=snakemake.threads,
    )
    make_demo_bert(Path(snakemake.output.bert), snakemake.params.seed)
