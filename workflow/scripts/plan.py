"""Rule `plan`: see stm.plan.make."""

from pathlib import Path

from stm.config import parse_config
from stm.jobs.progress import log_to
from stm.plan.make import describe_plan, make_plan, write_plan

config = parse_config(snakemake.config)

with log_to(snakemake.log[0]):
    plan = make_plan(config)
    write_plan(plan, Path(snakemake.output.plan))
    print(describe_plan(plan, config))
