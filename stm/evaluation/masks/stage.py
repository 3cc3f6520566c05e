"""Two stages that measure masks: coverage of the true boxes, and agreement of cached maps with maps of the crop."""

from pathlib import Path
from typing import Any

from stm.config import MaskQuality
from stm.datasets.moving_shapes.stage import GENERATE
from stm.stages.declaration import Files, Stage
from stm.stages.jobs import Job


def _settings(job: Job) -> MaskQuality:
    settings = job.config.mask_quality
    assert settings is not None, "the stage only applies to configs with the section"
    return settings


def _maps(job: Job) -> Files:
    """The frames, similarity maps of every caption source, motion maps and true boxes of the measured split."""
    layout, shards = job.layout, job.shards(_settings(job).split)
    return {
        "frames": [layout.frames(shard) for shard in shards],
        "similarity": [layout.similarity(source, shard) for source in job.config.captions for shard in shards],
        "motion": [layout.motion(shard) for shard in shards],
        "truth": GENERATE.outputs(job)["truth"],
    }


def _measure_quality(job: Job, inputs: Files, outputs: Files, processes: int) -> None:
    from stm.evaluation.masks.box_coverage import measure_mask_quality

    sources: dict[str, list[Path]] = {source: [] for source in job.config.captions}
    for path in inputs["similarity"]:
        sources[path.parent.name].append(path)
    measure_mask_quality(
        inputs["frames"], sources, inputs["motion"], inputs["truth"], _settings(job), outputs["quality"]
    )


def _cached(job: Job) -> Files:
    """The frames of the measured split, and their similarity maps for the first packed caption source."""
    layout, source = job.layout, job.config.pack.sources[0]
    shards = job.shards(_settings(job).split)
    return {
        "tars": [layout.frames_tar(shard) for shard in shards],
        "frames": [layout.frames(shard) for shard in shards],
        "similarity": [layout.similarity(source, shard) for shard in shards],
    }


def _measure_agreement(job: Job, inputs: Files, outputs: Files, processes: int) -> None:
    from stm.evaluation.masks.crop_agreement import measure_crop_agreement

    settings = _settings(job)
    measure_crop_agreement(
        inputs["tars"],
        inputs["frames"],
        inputs["similarity"],
        job.config.similarity,
        settings.image_size,
        settings.patch_size,
        outputs["agreement"],
        crops=settings.crops,
        seed=job.config.seed,
        ratio=settings.text_ratio,
    )


def _sources(job: Job) -> dict[str, Any]:
    return {"sources": list(job.config.captions)}


MASK_QUALITY = Stage(
    name="mask_quality",
    title="how well masks cover the named object's true box",
    per=("dataset",),
    inputs=_maps,
    outputs=lambda job: {"quality": job.layout.mask_quality},
    settings=("mask_quality",),
    facts=_sources,
    receipt="quality",
    applies=lambda config: config.mask_quality is not None,
    otherwise="the config has no section mask_quality",
    run=_measure_quality,
)

CROP_AGREEMENT = Stage(
    name="crop_agreement",
    title="how well masks from cached maps agree with masks from maps of the crop",
    per=("dataset",),
    inputs=_cached,
    outputs=lambda job: {"agreement": job.layout.crop_agreement},
    settings=("mask_quality", "similarity", "seed"),
    receipt="agreement",
    applies=lambda config: config.mask_quality is not None and bool(config.pack.sources),
    otherwise="crop-agreement needs the section mask_quality and a caption source in pack.captions",
    run=_measure_agreement,
)
