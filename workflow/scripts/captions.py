"""Rule `captions`: see stm.preprocess.captions.write.write_captions."""

from pathlib import Path

from stm.config import parse_config
from stm.jobs.progress import log_to
from stm.preprocess.captions.write import write_captions

config = parse_config(snakemake.config).of(snakemake.wildcards.dataset)

with log_to(snakemake.log[0]):
    write_captions(
        slice_path=Path(snakemake.input.slice),
        frames_tar=Path(snakemake.input.tar),
        frames_index=Path(snakemake.input.frames),
        output=Path(snakemake.output.captions),
        source=config.captions[snakemake.wildcards.source],
        bad_input=config.bad_input,
    )
