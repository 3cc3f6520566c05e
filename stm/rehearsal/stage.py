"""The rehearse stage: the whole workflow of the config at small size, before the full one runs."""

from stm.stages.declaration import Files, Stage
from stm.stages.jobs import Job


def _run(job: Job, inputs: Files, outputs: Files, processes: int) -> str:
    from stm.rehearsal.rehearse import rehearse

    return rehearse(job.study, job.layout.rehearsal, outputs["record"], processes)


REHEARSE = Stage(
    name="rehearse",
    title="run the whole workflow at small size, before the full one",
    per=(),
    outputs=lambda job: {"record": job.layout.rehearsal / "rehearsal.json"},
    settings=("*",),
    threads=lambda job, cores: cores,
    processes=True,
    run=_run,
)
