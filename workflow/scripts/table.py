"""Rule `table`: see stm.report.write_table."""

from stm.config import parse_config
from stm.jobs.progress import log_to
from stm.report import write_table

config = parse_config(snakemake.config)

with log_to(snakemake.log[0]):
    write_table(config, snakemake.wildcards.table)
