"""The similarity stage (patch-text similarity maps) and the embeddings stage (patch embeddings, if kept)."""

from stm.config import Similarity
from stm.preprocess.captions.stage import captions_per_clip
from stm.preprocess.frames.stage import frames_of
from stm.pretrained.sizes import clip_image_flops, clip_width
from stm.stages.costs import Cost, Workload, clips_to_process
from stm.stages.declaration import Files, Stage
from stm.stages.jobs import Job


def _embed(job: Job, inputs: Files, outputs: Files, processes: int) -> None:
    from stm.preprocess.frames.removal import restore_frames
    from stm.preprocess.similarity.score import write_embeddings

    restore_frames(job, processes)
    config = job.config
    write_embeddings(inputs["tar"], inputs["frames"], outputs["embeddings"], config.similarity, config.grid)


def _score(job: Job, inputs: Files, outputs: Files, processes: int) -> None:
    from stm.preprocess.frames.removal import restore_frames
    from stm.preprocess.similarity.score import write_similarity

    if "embeddings" not in inputs:
        restore_frames(job, processes)
    write_similarity(
        inputs["tar"],
        inputs["frames"],
        inputs["captions"],
        outputs["similarity"],
        job.config.similarity,
        job.config.grid,
        job.config.bad_input,
        embeddings=inputs.get("embeddings"),
    )


def _similarity_inputs(job: Job) -> Files:
    """Return the frames and captions, and the embeddings if the config keeps them."""
    kept = job.config.similarity.keep_embeddings
    embeddings = {"embeddings": job.layout.embeddings(job.shard)} if kept else {}
    return {**frames_of(job), "captions": job.layout.captions(job.source, job.shard), **embeddings}


def _cost_of_embeddings(job: Job, load: Workload) -> Cost | None:
    config = job.config
    embedded = clips_to_process(config, load, packed=config.pack.similarity and bool(config.pack.sources))
    if embedded is None or not (config.captions and config.similarity.keep_embeddings):
        return None
    model, patches = config.similarity.model, embedded.clips * load.stored_frames * load.cells
    return Cost(
        embedded.shards,
        flops=patches * clip_image_flops(model),
        precision=config.similarity.precision,
        gigabytes=patches * 2 * clip_width(model) / 1e9,
    )


def _cost_of_maps(job: Job, load: Workload) -> Cost | None:
    pack, settings = job.config.pack, job.config.similarity
    scored = clips_to_process(job.config, load, packed=pack.similarity and job.source in pack.sources)
    if scored is None:
        return None
    patches = scored.clips * load.stored_frames * load.cells
    flops = 0.0 if settings.keep_embeddings else patches * clip_image_flops(settings.model)
    maps = patches * captions_per_clip(job.config.captions[job.source])
    return Cost(scored.shards, flops=flops, precision=settings.precision, gigabytes=maps * 2 / 1e9)


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

SIMILARITY = Stage(
    name="similarity",
    title="patch-text similarity maps",
    per=("dataset", "source", "shard"),
    inputs=_similarity_inputs,
    models=lambda job: {"model": [job.config.similarity.model]},
    outputs=lambda job: {"similarity": job.layout.similarity(job.source, job.shard)},
    settings=("similarity", "grid", "bad_input"),
    resources={"mem_mb": 16000, "runtime": 480, "gpu": 1},
    shared=True,
    receipt="similarity",
    records={"settings": "similarity", "grid": "grid", "policy": "bad_input.policy"},
    implied=Similarity.implied,  # as fingerprints do
    cost=_cost_of_maps,
    run=_score,
)
