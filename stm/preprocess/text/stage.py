"""The text stage: one vector per caption, by a frozen text encoder."""

from stm.stages.declaration import Files, Stage
from stm.stages.jobs import Job


def _run(job: Job, inputs: Files, outputs: Files, processes: int) -> None:
    from stm.preprocess.text.encode import write_text

    write_text(inputs["captions"], outputs["text"], job.config.text, job.config.bad_input)


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
    run=_run,
)
