# Shared by all rules: the validated config, the paths of results, and the declarations of stages.

import logging
import os
import sys
from functools import cache
from pathlib import Path

from snakemake.exceptions import WorkflowError
from snakemake.io import IOFile
from snakemake.logging import logger
from snakemake.utils import validate

from stm.config import ConfigError, parse_config, resolve_config
from stm.datasets import DatasetError
from stm.datasets.video_text.tasks import check_tasks
from stm.jobs.gpus import POOL, share_gpus
from stm.jobs.messages import LogLevelError, configure_messages
from stm.layout import check_results
from stm.manifest import SHARD_PATTERN, read_shards
from stm.plan.requests import Requests
from stm.stages.jobs import Jobs
from stm.stages.journey import all_stages
from stm.stages.provenance import StaleInputError
from stm.stages.reasons import name_changed_keys, shorten_lists
from stm.stages.rules import DeclaredRule, check_targets, describe_shared_cores
from stm.training.trackers import check_trackers

try:
    configure_messages()
except LogLevelError as error:
    raise WorkflowError(str(error)) from None

try:
    # `extends` is a feature of stm, not of Snakemake: it is resolved here, once, for all rules and scripts.
    resolved = resolve_config(
        config, workflow.configfiles, workflow.config_settings.config
    )
    config.clear()
    config.update(resolved)
    CONFIG = parse_config(config, ", ".join(map(str, workflow.configfiles)) or "config")
    check_results(CONFIG)
    check_tasks(CONFIG)
    check_targets(CONFIG)
    check_trackers(CONFIG.trackers)
except (ConfigError, DatasetError) as error:
    raise WorkflowError(str(error)) from None

# The schema is generated from the same classes. Those set the defaults, because jsonschema would fill in those of the wrong
# source; and the types, because Snakemake passes the 2 of `--config 'frames={every: 2}'` as text.
validate(
    CONFIG.model_dump(mode="json", exclude_unset=True),
    workflow.source_path("../../config/schema.json"),
    set_default=False,
)


wildcard_constraints:
    dataset="|".join(CONFIG.dataset_names),
    shard=SHARD_PATTERN,
    split=r"[A-Za-z0-9][A-Za-z0-9_-]*",
    source=r"[A-Za-z0-9][A-Za-z0-9_-]*",
    run=r"[A-Za-z0-9][A-Za-z0-9_-]*",
    task=r"[A-Za-z0-9][A-Za-z0-9_-]*",
    table="|".join(CONFIG.tables) or "-",
    figure="|".join(CONFIG.figures) or "-",


# Lines of dry runs stay readable: see stm/stages/reasons.py.
name_changed_keys()
logger.addFilter(shorten_lists)


# Whether results are shared with other projects (`--cache`).
SHARED = workflow.workflow_settings.cache is not None
if SHARED:
    # Snakemake itself checks the folder only when it stores the first result, after the work is done.
    place = os.environ.get("SNAKEMAKE_OUTPUT_CACHE", "")
    if "://" not in place and not (place and os.access(place, os.W_OK)):
        raise WorkflowError(
            "--cache: set the environment variable SNAKEMAKE_OUTPUT_CACHE to an existing, writable folder; "
            f"it is {place!r}"
        )


@cache
def read_index(path, modified):
    """The shards that an index lists; `modified`, the time of its last change, keeps the cache up to date."""
    return read_shards(path)


def list_shards(dataset):
    """The shards of a dataset, which are known after the checkpoint `split`."""
    # First those of the dataset that its frames come from: see `DeclaredRule`.
    lender = JOBS.configs[dataset].frames.from_dataset
    if lender is not None:
        list_shards(lender)
    index = Path(checkpoints.split.get(dataset=dataset).output.index)
    return read_index(index, index.stat().st_mtime_ns)


# Each dataset has its own results folder, and tables, figures and the page have another; with one dataset both are the same.
JOBS = Jobs(CONFIG, list_shards)


REMOVES_FRAMES = not all(one.frames.keep for one in JOBS.configs.values())


def packed(path):
    """A packed file. Snakemake deletes outputs before a job, but removed frames are taken from the shard that it replaces."""
    return update(path) if REMOVES_FRAMES else path


# A cluster's scheduler assigns GPUs. On one machine jobs choose among those that this process finds (`stm.jobs.gpus`), and no more
# are started than there are. Processes that run single jobs are told by their environment where they are.
GPUS = 0
if workflow.is_main_process:
    LOCAL = workflow.resource_settings.nodes is None
    os.environ.pop(POOL, None)
    if LOCAL:
        offered = workflow.global_resources
        GPUS = share_gpus(offered["gpu"].value if "gpu" in offered else None)
    if GPUS:
        workflow.register_resource("gpu", GPUS)
    if not LOCAL and workflow.resource_settings.cores == 1:
        # The default of dry runs, which would show all jobs of a cluster with one thread.
        workflow.register_resource("_cores", None)
else:
    LOCAL = POOL in os.environ

if workflow.is_main_process and LOCAL and not GPUS:
    if shared_cores := describe_shared_cores(CONFIG):
        logging.getLogger("stm.workflow").warning(shared_cores)

REQUESTS = None if LOCAL else Requests(JOBS, planned=workflow.is_main_process)


def limits(*resources):
    """The most that jobs may request, where the profile's default resources say so, as `max_runtime` does."""
    defaults = workflow.resource_settings._parsed_default_resources
    found = {}
    for name in resources:
        if f"max_{name}" not in defaults:
            continue
        most = defaults[f"max_{name}"]
        if most.is_evaluable() or not isinstance(most.value, int):
            raise WorkflowError(
                f"default-resources: max_{name} must be a plain number (max_runtime: minutes, max_mem_mb: megabytes)"
            )
        found[name] = most.value
    return found


LIMITS = limits("runtime", "mem_mb")


def unrecorded(path):
    """Whether Snakemake has no record of a file. Forced jobs check what they read when they start, as all jobs do."""
    forced = workflow.dag_settings.forcerun or workflow.dag_settings.forceall
    return (
        not forced
        and workflow.is_main_process
        and workflow.persistence.metadata(IOFile(path.as_posix())) is None
    )


def refuse(error):
    """Convert an error into one that is shown without a traceback, or show it and exit."""
    if isinstance(error, StaleInputError):
        # Snakemake ignores exceptions of rules whose outputs exist; and prints none that it meets after a checkpoint.
        print(error, file=sys.stderr)
        sys.exit(1)
    return WorkflowError(str(error))


def declared(name):
    """The declaration of a stage in terms of a rule; see `stm.stages.rules.DeclaredRule`."""
    return DeclaredRule(
        all_stages()[name],
        JOBS,
        refuse=refuse,
        cores=workflow.resource_settings.cores,
        sharing=SHARED,
        unrecorded=unrecorded,
        gpus=GPUS,
        requests=REQUESTS,
        limits=LIMITS,
    )
