"""Two stages that measure masks: coverage of the true boxes, and agreement of cached maps with maps of the crop."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from stm.config import CropComparison, MaskQuality, Similarity
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


def _comparison(job: Job) -> CropComparison:
    settings = job.config.crop_comparison
    assert settings is not None, "the stage only applies to datasets whose maps are compared"
    return settings


def _compared_shards(job: Job) -> list[str]:
    # Clips are assigned to shards by a hash: a few shards are a random sample, and a split may have hundreds.
    return job.shards(_comparison(job).split)[: CropComparison.shards]


def _cached(job: Job) -> Files:
    """The frames of the compared split, and their similarity maps for the first packed caption source."""
    layout, source = job.layout, job.config.pack.sources[0]
    shards = _compared_shards(job)
    return {
        "tars": [layout.frames_tar(shard) for shard in shards],
        "frames": [layout.frames(shard) for shard in shards],
        "similarity": [layout.similarity(source, shard) for shard in shards],
    }


def _measure_agreement(job: Job, inputs: Files, outputs: Files, processes: int) -> None:
    from stm.evaluation.masks.crop_agreement import measure_crop_agreement
    from stm.preprocess.frames.removal import restore_frames

    for shard in _compared_shards(job):
        restore_frames(replace(job, shard=shard), processes)
    measure_crop_agreement(
        inputs["tars"],
        inputs["frames"],
        inputs["similarity"],
        job.config.similarity,
        _comparison(job),
        outputs["agreement"],
        seed=job.config.seed,
    )


def _compared(job: Job) -> dict[str, Any]:
    return {"crop_agreement": _comparison(job).fingerprint(), "pack.captions": job.config.pack.sources[0]}


def _sources(job: Job) -> dict[str, Any]:
    return {"captions": list(job.config.captions)}


MASK_QUALITY = Stage(
    name="mask_quality",
    title="how well masks cover the named object's true box",
    per=("dataset",),
    inputs=_maps,
    outputs=lambda job: {"quality": job.layout.mask_quality},
    settings=("mask_quality",),
    facts=_sources,
    receipt="quality",
    records={"settings": "mask_quality", "sources": "facts.captions"},
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
    settings=("similarity", "seed"),
    facts=_compared,
    receipt="agreement",
    records={
        "settings": "similarity",
        "seed": "seed",
        "comparison": "facts.crop_agreement",
        "source": "facts.pack.captions",
    },
    resources={"mem_mb": 16000, "runtime": 480, "gpu": 1},
    implied=Similarity.implied,
    applies=lambda config: config.crop_comparison is not None,
    otherwise="crop-agreement needs a caption source in pack.captions, and a run whose mask needs similarity or the section "
    "crop_agreement or mask_quality",
    run=_measure_agreement,
)
