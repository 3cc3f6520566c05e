"""Rule `figure`: see stm.report.write_figure."""

from stm.config import parse_config
from stm.jobs.progress import log_to
from stm.report import write_figure

config = parse_config(snakemake.config)

with log_to(snakemake.log[0]):
    write_figure(config, snakemake.wildcards.figure)
