"""Rule `captions`: see stm.preprocess.captions.write_captions."""

from pathlib import Path

from pydantic import TypeAdapter

from stm.config import BadInput, CaptionSource
from stm.preprocess.captions import write_captions
from stm.progress import log_to

with log_to(snakemake.log[0]):
    write_captions(
        slice_path=Path(snakemake.input.slice),
        frames_tar=Path(snakemake.input.tar),
        frames_index=Path(snakemake.input.frames),
        output=Path(snakemake.output.captions),
        source=TypeAdapter(CaptionSource).validate_python(snakemake.params.source),
        bad_input=BadInput.model_validate(snakemake.params.bad_input),
    )
