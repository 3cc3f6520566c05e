"""Rule `mask_quality`: see stm.evaluation.masks.box_coverage.measure_mask_quality."""

from pathlib import Path

from stm.config import MaskQuality
from stm.evaluation.masks.box_coverage import measure_mask_quality
from stm.jobs.progress import log_to

sources = {source: [] for source in snakemake.params.sources}
for path in map(Path, snakemake.input.similarity):
    sources[path.parent.name].append(path)

with log_to(snakemake.log[0]):
    measure_mask_quality(
        frames_indexes=[Path(path) for path in snakemake.input.frames],
        similarity=sources,
        motion=[Path(path) for path in snakemake.input.motion],
        truth=Path(snakemake.input.truth),
        settings=MaskQuality.model_validate(snakemake.params.settings),
        output=Path(snakemake.output.quality),
    )
