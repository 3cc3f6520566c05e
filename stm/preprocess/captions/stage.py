"""The captions stage: what is said about each clip, by source."""

from stm.preprocess.frames.stage import frames_of
from stm.stages.declaration import Files, Stage
from stm.stages.jobs import Job


def _run(job: Job, inputs: Files, outputs: Files, processes: int) -> None:
    from stm.preprocess.captions.write import write_captions

    source = job.config.captions[job.source]
    write_captions(inputs["slice"], inputs["tar"], inputs["frames"], outputs["captions"], source, job.config.bad_input)


CAPTIONS = Stage(
    name="captions",
    title="captions, by source",
    per=("dataset", "source", "shard"),
    inputs=lambda job: {"slice": job.slice, **frames_of(job)},
    models=lambda job: {"model": [getattr(job.config.captions[job.source], "model", None)]},
    outputs=lambda job: {"captions": job.layout.captions(job.source, job.shard)},
    settings=("captions.{source}", "bad_input"),
    resources={"mem_mb": 16000, "runtime": 480, "gpu": 1},
    shared=True,
    receipt="captions",
    run=_run,
)
