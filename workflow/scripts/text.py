"""Rule `text`: see stm.preprocess.text.encode.write_text."""

from pathlib import Path

from stm.config import parse_config
from stm.jobs.progress import log_to
from stm.preprocess.text.encode import write_text

config = parse_config(snakemake.config).of(snakemake.wildcards.dataset)

with log_to(snakemake.log[0]):
    write_text(
        captions=Path(snakemake.input.captions),
        output=Path(snakemake.output.text),
        settings=config.text,
        bad_input=config.bad_input,
    )
