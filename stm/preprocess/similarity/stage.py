"""Stages of patch-text similarity maps, which share the image tower's work between the caption sources of a shard.

With one source, `similarity` runs CLIP itself. With several, `joint_similarity` runs it once for all of them, and `similarity`
takes the maps of each source from its table, which is temporary. If the config keeps patch embeddings, `embeddings` runs the
image tower, and `similarity` only multiplies: a source that is added later then costs no image tower. Embeddings take `width`
numbers per patch, where maps take one per caption: of a shard of Something-Something V2 at 48 frames per clip, 13 GB for 4
minutes of an H200. They are therefore not what the sources share by default.
"""

from collections.abc import Callable
from dataclasses import replace
from math import inf
from pathlib import Path

from stm.config import Similarity
from stm.manifest import split_of
from stm.preprocess.captions.stage import captions_per_clip
from stm.preprocess.frames.stage import frames_of
from stm.pretrained.sizes import clip_image_flops, clip_width
from stm.stages.costs import Cost, Workload
from stm.stages.declaration import Files, Stage
from stm.stages.jobs import Job

_LATE = 10**9  # number of a shard after all others


def scored_sources(job: Job) -> list[str]:
    """Return the caption sources whose maps of the job's shard anything reads, in config order."""
    config, split = job.config, split_of(job.shard)
    needed = set(config.pack.sources if config.pack.similarity else ())
    if config.mask_quality is not None and config.mask_quality.split == split:
        needed |= set(config.captions)
    if config.crop_comparison is not None and config.crop_comparison.split == split:
        needed.add(config.pack.sources[0])
    return [source for source in config.captions if source in needed]


def _is_joint(job: Job) -> bool:
    """Whether the maps of the job's source are made together with those of others."""
    sources = scored_sources(job)
    return job.source in sources and len(sources) > 1 and not job.config.similarity.keep_embeddings


# ------------------------------------------------------------------------------------------------------------------- work


def _embed(job: Job, inputs: Files, outputs: Files, processes: int) -> None:
    from stm.preprocess.frames.removal import restore_frames
    from stm.preprocess.similarity.score import write_embeddings

    restore_frames(job, processes)
    config = job.config
    write_embeddings(inputs["tar"], inputs["frames"], outputs["embeddings"], config.similarity, config.grid)


def _score_all(job: Job, inputs: Files, outputs: Files, processes: int) -> None:
    from stm.preprocess.frames.removal import restore_frames
    from stm.preprocess.similarity.score import write_joint_similarity

    restore_frames(job, processes)
    captions = dict(zip(scored_sources(job), inputs["captions"], strict=True))
    write_joint_similarity(
        inputs["tar"], inputs["frames"], captions, outputs["maps"], job.config.similarity, job.config.grid
    )


def _score(job: Job, inputs: Files, outputs: Files, processes: int) -> None:
    from stm.preprocess.frames.removal import restore_frames
    from stm.preprocess.similarity.score import take_similarity, write_similarity

    config = job.config
    if _is_joint(job):
        take_similarity(
            inputs["maps"],
            job.source,
            inputs["frames"],
            inputs["captions"],
            outputs["similarity"],
            config.similarity,
            config.grid,
            config.bad_input,
        )
    else:
        if "embeddings" not in inputs:
            restore_frames(job, processes)
        write_similarity(
            inputs["tar"],
            inputs["frames"],
            inputs["captions"],
            outputs["similarity"],
            config.similarity,
            config.grid,
            config.bad_input,
            embeddings=inputs.get("embeddings"),
        )


def _inputs_of_all(job: Job) -> Files:
    return {
        **frames_of(job),
        "captions": [job.layout.captions(source, job.shard) for source in scored_sources(job)],
    }


def _inputs_of_one(job: Job) -> Files:
    """Return the captions, and either the maps of all sources, or the frames and any kept embeddings."""
    captions: dict[str, Path] = {"captions": job.layout.captions(job.source, job.shard)}
    if _is_joint(job):
        return {"frames": job.layout.frames(job.shard), "maps": job.layout.joint_similarity(job.shard), **captions}
    kept = job.config.similarity.keep_embeddings
    return {**frames_of(job), **captions, **({"embeddings": job.layout.embeddings(job.shard)} if kept else {})}


# ------------------------------------------------------------------------------------------------------------------ costs


def _clips(job: Job, load: Workload, included: Callable[[Job], bool]) -> Workload | None:
    """Return the clips of the shards whose jobs are included."""

    def shards(split: str) -> float:
        # Shards of a split differ only in whether they are among the first, whose guides are read.
        if included(replace(job, shard=f"{split}-{_LATE}")):
            return inf
        return job.jobs.guided_shards(job.dataset, split) if included(replace(job, shard=f"{split}-0")) else 0

    return load.first(shards)


def _patches(scored: Workload) -> float:
    return scored.clips * scored.stored_frames * scored.cells


def _image_flops(job: Job, scored: Workload) -> float:
    """The FLOPs of the image tower on all patches, or on all frames at once."""
    settings = job.config.similarity
    if settings.method == "dense":
        return scored.clips * scored.stored_frames * clip_image_flops(settings.model, scored.cells)
    return _patches(scored) * clip_image_flops(settings.model)


def _cost_of_embeddings(job: Job, load: Workload) -> Cost | None:
    settings = job.config.similarity
    embedded = _clips(job, load, lambda one: bool(scored_sources(one)))
    if embedded is None or not settings.keep_embeddings:
        return None
    return Cost(
        embedded.shards,
        flops=_image_flops(job, embedded),
        precision=settings.precision,
        gigabytes=_patches(embedded) * 2 * clip_width(settings.model) / 1e9,
    )


def _cost_of_joint_maps(job: Job, load: Workload) -> Cost | None:
    settings = job.config.similarity
    scored = _clips(job, load, lambda one: len(scored_sources(one)) > 1)
    if scored is None or settings.keep_embeddings:
        return None
    return Cost(scored.shards, flops=_image_flops(job, scored), precision=settings.precision)  # its files are temporary


def _cost_of_maps(job: Job, load: Workload) -> Cost | None:
    settings = job.config.similarity
    scored = _clips(job, load, lambda one: one.source in scored_sources(one))
    if scored is None:
        return None
    alone = _clips(job, load, lambda one: one.source in scored_sources(one) and not _is_joint(one))
    flops = 0.0 if settings.keep_embeddings or alone is None else _image_flops(job, alone)
    maps = _patches(scored) * captions_per_clip(job.config.captions[job.source])
    return Cost(scored.shards, flops=flops, precision=settings.precision, gigabytes=maps * 2 / 1e9)


# ----------------------------------------------------------------------------------------------------------- declarations

EMBEDDINGS = Stage(
    name="embeddings",
    title="patch embeddings, where the config keeps them",
    per=("dataset", "shard"),
    inputs=frames_of,
    models=lambda job: {"model": [job.config.similarity.model]},
    outputs=lambda job: {"embeddings": job.layout.embeddings(job.shard)},
    settings=("similarity", "grid"),
    resources={"mem_mb": 16000, "runtime": 480, "gpu": 1},
    shared=True,
    receipt="embeddings",
    records={"settings": "similarity", "grid": "grid"},
    implied=Similarity.implied,  # as fingerprints do
    cost=_cost_of_embeddings,
    run=_embed,
)

JOINT_SIMILARITY = Stage(
    name="joint_similarity",
    title="similarity maps of all caption sources of a shard, where there are several",
    per=("dataset", "shard"),
    inputs=_inputs_of_all,
    models=lambda job: {"model": [job.config.similarity.model]},
    outputs=lambda job: {"maps": job.layout.joint_similarity(job.shard)},
    settings=("similarity", "grid"),
    resources={"mem_mb": 16000, "runtime": 480, "gpu": 1},
    receipt="maps",
    records={"settings": "similarity", "grid": "grid"},
    implied=Similarity.implied,  # as fingerprints do
    cost=_cost_of_joint_maps,
    run=_score_all,
)

SIMILARITY = Stage(
    name="similarity",
    title="patch-text similarity maps",
    per=("dataset", "source", "shard"),
    inputs=_inputs_of_one,
    models=lambda job: {"model": [job.config.similarity.model]},
    outputs=lambda job: {"similarity": job.layout.similarity(job.source, job.shard)},
    settings=("similarity", "grid", "bad_input"),
    resources={
        "mem_mb": 16000,
        "runtime": 480,
        "gpu": lambda job: None if _is_joint(job) else 1,
    },  # made maps are only copied
    shared=True,
    receipt="similarity",
    records={"settings": "similarity", "grid": "grid", "policy": "bad_input.policy"},
    implied=Similarity.implied,  # as fingerprints do
    cost=_cost_of_maps,
    run=_score,
)
