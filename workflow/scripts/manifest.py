"""Rule `manifest`: see stm.datasets.build_manifest."""

from pathlib import Path

from stm.config import parse_config
from stm.datasets import build_manifest
from stm.jobs.progress import log_to
from stm.layout import Layout

config = parse_config(snakemake.config).of(snakemake.wildcards.dataset)

with log_to(snakemake.log[0]):
    build_manifest(
        config,
        generated=Layout.of(config).generated if config.dataset.source == "moving-shapes" else None,
        manifest=Path(snakemake.output.manifest),
        quarantine=Path(snakemake.output.quarantine),
        processes=snakemake.threads,
    )
