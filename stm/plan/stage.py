"""The plan stage: estimates what a run will cost before it runs."""

from stm.datasets.stage import annotation_files, listing
from stm.stages.declaration import Files, Stage
from stm.stages.jobs import Job


def _run(job: Job, inputs: Files, outputs: Files, processes: int) -> str:
    from stm.plan.make import describe_plan, make_plan, write_plan

    plan = make_plan(job.study)
    write_plan(plan, outputs["plan"])
    return describe_plan(plan, job.study)


PLAN = Stage(
    name="plan",
    title="estimate what the run will cost, before it runs",
    per=(),
    inputs=lambda job: {"annotations": [path for name in job.jobs.configs for path in annotation_files(job.on(name))]},
    outputs=lambda job: {"plan": job.layout.plan},
    settings=("*",),
    facts=lambda job: {"listing": [listing(job.on(name)) for name in job.jobs.configs]},
    run=_run,
)
