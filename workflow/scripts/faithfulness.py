"""Rule `faithfulness`: see stm.evaluation.masks.crop_agreement.measure_crop_agreement."""

from pathlib import Path

from stm.config import MaskQuality, parse_config
from stm.evaluation.masks.crop_agreement import measure_crop_agreement
from stm.jobs.progress import log_to

settings = MaskQuality.model_validate(snakemake.params.settings)

with log_to(snakemake.log[0]):
    measure_crop_agreement(
        [Path(path) for path in snakemake.input.tars],
        [Path(path) for path in snakemake.input.frames],
        [Path(path) for path in snakemake.input.similarity],
        parse_config(snakemake.config).of(snakemake.wildcards.dataset).similarity,
        settings.image_size,
        settings.patch_size,
        Path(snakemake.output.faithfulness),
        crops=settings.crops,
        seed=snakemake.params.seed,
        ratio=settings.text_ratio,
    )
