"""Rule `report`: see stm.report.build_report."""

from stm.config import parse_config
from stm.jobs.progress import log_to
from stm.layout import Layout
from stm.report import build_report

config = parse_config(snakemake.config)

with log_to(snakemake.log[0]):
    build_report(config, Layout.of(config))
