"""Rule `motion`: see stm.preprocess.motion.measure.extract_motion."""

from pathlib import Path

from stm.config import parse_config
from stm.jobs.progress import log_to
from stm.layout import dataset_root
from stm.preprocess.motion.measure import extract_motion

config = parse_config(snakemake.config).of(snakemake.wildcards.dataset)

with log_to(snakemake.log[0]):
    extract_motion(
        slice_path=Path(snakemake.input.slice),
        root=dataset_root(config),
        frames_index=Path(snakemake.input.frames),
        output=Path(snakemake.output.motion),
        settings=config.motion,
        grid=config.grid,
        bad_input=config.bad_input,
        processes=snakemake.threads,
    )
