"""The similarity stage, patch-text similarity maps, and that of the patches' embeddings, where they are kept."""

from stm.preprocess.frames.stage import frames_of
from stm.stages.declaration import Files, Stage
from stm.stages.jobs import Job


def _embed(job: Job, inputs: Files, outputs: Files, processes: int) -> None:
    from stm.preprocess.similarity.score import write_embeddings

    config = job.config
    write_embeddings(inputs["tar"], inputs["frames"], outputs["embeddings"], config.similarity, config.grid)


def _score(job: Job, inputs: Files, outputs: Files, processes: int) -> None:
    from stm.preprocess.similarity.score import write_similarity

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


def _scored(job: Job) -> Files:
    """Frames and captions; the embeddings too, where the config keeps them."""
    kept = job.config.similarity.keep_embeddings
    embeddings = {"embeddings": job.layout.embeddings(job.shard)} if kept else {}
    return {**frames_of(job), "captions": job.layout.captions(job.source, job.shard), **embeddings}


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
    run=_embed,
)

SIMILARITY = Stage(
    name="similarity",
    title="patch-text similarity maps",
    per=("dataset", "source", "shard"),
    inputs=_scored,
    models=lambda job: {"model": [job.config.similarity.model]},
    outputs=lambda job: {"similarity": job.layout.similarity(job.source, job.shard)},
    settings=("similarity", "grid", "bad_input"),
    resources={"mem_mb": 16000, "runtime": 480, "gpu": 1},
    shared=True,
    receipt="similarity",
    run=_score,
)
