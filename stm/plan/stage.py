"""The plan stage: estimates what a run will cost before it runs."""

from stm.datasets.stage import annotation_files, listing
from stm.stages.declaration import Files, Stage
from stm.stages.jobs import Job
from stm.stages.journey import missing_models


def _run(job: Job, inputs: Files, outputs: Files, processes: int) -> str:
    from stm.plan.check import check_memory, check_plan
    from stm.plan.make import describe_plan, make_plan, write_plan

    check_plan(job.study)
    check_memory(job.study)
    plan = make_plan(job.study)
    write_plan(plan, outputs["plan"])
    missing = missing_models(job.study)
    notes = ["not there yet, and needed before anything is run:", *(f"  {line}" for line in missing)] if missing else []
    return "\n".join([describe_plan(plan, job.study), *notes])


def _check(job: Job) -> None:
    from stm.plan.check import check_memory, check_plan

    check_plan(job.study)
    check_memory(job.study)


PLAN = Stage(
    name="plan",
    title="estimate what the run will cost, before it runs",
    per=(),
    inputs=lambda job: {"annotations": [path for name in job.jobs.configs for path in annotation_files(job.on(name))]},
    outputs=lambda job: {"plan": job.layout.plan},
    settings=("*",),
    check=_check,
    facts=lambda job: {"listing": [listing(job.on(name)) for name in job.jobs.configs]},
    run=_run,
)
