"""The text stage: one vector per caption, from a frozen text encoder."""

from stm.preprocess.captions.stage import captions_per_clip
from stm.pretrained.sizes import TEXT_FLOPS
from stm.stages.costs import Cost, Workload, guided_clips
from stm.stages.declaration import Files, Stage
from stm.stages.jobs import Job


def _run(job: Job, inputs: Files, outputs: Files, processes: int) -> None:
    from stm.preprocess.text.encode import write_text

    write_text(inputs["captions"], outputs["text"], job.config.text, job.config.bad_input)


def _cost(job: Job, load: Workload) -> Cost | None:
    if not (job.config.pack.text and job.source in job.config.pack.sources):
        return None
    packed = guided_clips(job, load)
    if packed is None:
        return None
    texts = packed.clips * captions_per_clip(job.config.captions[job.source])
    gigabytes = texts * 1e-6  # about 1 kB per vector
    return Cost(packed.shards, flops=texts * TEXT_FLOPS, precision=job.config.text.precision, gigabytes=gigabytes)


TEXT = Stage(
    name="text",
    title="the captions' vectors",
    per=("dataset", "source", "shard"),
    inputs=lambda job: {"captions": job.layout.captions(job.source, job.shard)},
    models=lambda job: {"model": [job.config.text.model]},
    outputs=lambda job: {"text": job.layout.text(job.source, job.shard)},
    settings=("text", "bad_input"),
    resources={"mem_mb": 8000, "runtime": 120, "gpu": 1},
    shared=True,
    receipt="text",
    records={"settings": "text", "policy": "bad_input.policy"},
    cost=_cost,
    run=_run,
)
