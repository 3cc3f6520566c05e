"""Rule `frames`: see stm.preprocess.frames.extract.extract_frames."""

from pathlib import Path

from stm.config import parse_config
from stm.jobs.progress import log_to
from stm.layout import dataset_root
from stm.preprocess.frames.extract import extract_frames

config = parse_config(snakemake.config).of(snakemake.wildcards.dataset)

with log_to(snakemake.log[0]):
    extract_frames(
        slice_path=Path(snakemake.input.slice),
        root=dataset_root(config),
        tar=Path(snakemake.output.tar),
        index=Path(snakemake.output.index),
        settings=config.frames,
        bad_input=config.bad_input,
        processes=snakemake.threads,
    )
