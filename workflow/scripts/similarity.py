"""Rule `similarity`: see stm.preprocess.similarity.score.write_similarity."""

from pathlib import Path

from stm.config import parse_config
from stm.jobs.progress import log_to
from stm.preprocess.similarity.score import write_similarity

config = parse_config(snakemake.config).of(snakemake.wildcards.dataset)
embeddings = snakemake.input.get("embeddings")

with log_to(snakemake.log[0]):
    write_similarity(
        frames_tar=Path(snakemake.input.tar),
        frames_index=Path(snakemake.input.frames),
        captions=Path(snakemake.input.captions),
        output=Path(snakemake.output.similarity),
        settings=config.similarity,
        grid=config.grid,
        bad_input=config.bad_input,
        embeddings=Path(embeddings) if embeddings else None,
    )
