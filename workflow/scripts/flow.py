"""Rule `flow`: see stm.preprocess.flow.estimate.write_flow."""

from pathlib import Path

from stm.config import parse_config
from stm.jobs.progress import log_to
from stm.preprocess.flow.estimate import write_flow

config = parse_config(snakemake.config).of(snakemake.wildcards.dataset)

with log_to(snakemake.log[0]):
    write_flow(
        frames_tar=Path(snakemake.input.tar),
        frames_index=Path(snakemake.input.frames),
        output=Path(snakemake.output.flow),
        settings=config.flow,
        grid=config.grid,
        bad_input=config.bad_input,
        processes=snakemake.threads,
    )
