"""Rule `motion`: see stm.preprocess.motion.extract_motion."""

from pathlib import Path

from stm.preprocess.motion import extract_motion

from stm.config import BadInput, Motion
from stm.progress import log_to

with log_to(snakemake.log[0]):
    extract_motion(
        slice_path=Path(snakemake.input.slice),
        root=Path(snakemake.params.root),
        frames_index=Path(snakemake.input.frames),
        output=Path(snakemake.output.motion),
        settings=Motion.model_validate(snakemake.params.settings),
        grid=snakemake.params.grid,
        bad_input=BadInput.model_validate(snakemake.params.bad_input),
        processes=snakemake.threads,
    )
