"""Rule `embeddings`: see stm.preprocess.similarity.write_embeddings."""

from pathlib import Path

from stm.config import Similarity
from stm.preprocess.similarity import write_embeddings
from stm.progress import log_to

with log_to(snakemake.log[0]):
    write_embeddings(
        frames_tar=Path(snakemake.input.tar),
        frames_index=Path(snakemake.input.frames),
        output=Path(snakemake.output.embeddings),
        settings=Similarity.model_validate(snakemake.params.settings),
        grid=snakemake.params.grid,
    )
