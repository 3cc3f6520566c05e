"""Rule `frames`: see stm.preprocess.frames.extract_frames."""

from pathlib import Path

from stm.config import BadInput, Frames
from stm.preprocess.frames import extract_frames
from stm.progress import log_to

with log_to(snakemake.log[0]):
    extract_frames(
        slice_path=Path(snakemake.input.slice),
        root=Path(snakemake.params.root),
        tar=Path(snakemake.output.tar),
        index=Path(snakemake.output.index),
        settings=Frames.model_validate(snakemake.params.settings),
        bad_input=BadInput.model_validate(snakemake.params.bad_input),
        processes=snakemake.threads,
    )
