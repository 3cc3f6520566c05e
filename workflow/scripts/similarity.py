"""Rule `similarity`: see stm.preprocess.similarity.write_similarity."""

from pathlib import Path

from stm.config import BadInput, Similarity
from stm.preprocess.similarity import write_similarity
from stm.progress import log_to

embeddings = snakemake.input.get("embeddings")

with log_to(snakemake.log[0]):
    write_similarity(
        frames_tar=Path(snakemake.input.tar),
        frames_index=Path(snakemake.input.frames),
        captions=Path(snakemake.input.captions),
        output=Path(snakemake.output.similarity),
        settings=Similarity.model_validate(snakemake.params.settings),
        grid=snakemake.params.grid,
        bad_input=BadInput.model_validate(snakemake.params.bad_input),
        embeddings=Path(embeddings) if embeddings else None,
    )
