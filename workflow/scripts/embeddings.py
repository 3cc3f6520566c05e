"""Rule `embeddings`: see stm.preprocess.similarity.score.write_embeddings."""

from pathlib import Path

from stm.config import parse_config
from stm.jobs.progress import log_to
from stm.preprocess.similarity.score import write_embeddings

config = parse_config(snakemake.config).of(snakemake.wildcards.dataset)

with log_to(snakemake.log[0]):
    write_embeddings(
        frames_tar=Path(snakemake.input.tar),
        frames_index=Path(snakemake.input.frames),
        output=Path(snakemake.output.embeddings),
        settings=config.similarity,
        grid=config.grid,
    )
