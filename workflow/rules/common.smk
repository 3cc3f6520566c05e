# Shared by all rules: the checked config, where results go, and what rules read of their stages' declarations.

import os
from functools import cache
from pathlib import Path

from snakemake.exceptions import WorkflowError
from snakemake.utils import validate

from stm.config import ConfigError, parse_config, resolve_config
from stm.datasets import DatasetError
from stm.datasets.video_text.tasks import check_tasks
from stm.manifest import read_shards
from stm.stages.jobs import Jobs
from stm.stages.journey import all_stages
from stm.stages.rules import DeclaredRule

try:
    # `extends` is ours; from here on, and for the scripts, `config` has what it stands for.
    resolved = resolve_config(
        config, workflow.configfiles, workflow.config_settings.config
    )
    config.clear()
    config.update(resolved)
    CONFIG = parse_config(config, ", ".join(map(str, workflow.configfiles)) or "config")
    check_tasks(CONFIG)
except (ConfigError, DatasetError) as error:
    raise WorkflowError(str(error)) from None

# The schema is generated from the same classes; defaults stay theirs, jsonschema would fill in those of the wrong source.
validate(config, workflow.source_path("../../config/schema.json"), set_default=False)


wildcard_constraints:
    dataset="|".join(CONFIG.dataset_names),
    shard=r"[A-Za-z0-9][A-Za-z0-9_-]*-\d{5}",
    split=r"[A-Za-z0-9][A-Za-z0-9_-]*",
    source=r"[A-Za-z0-9][A-Za-z0-9_-]*",
    run=r"[A-Za-z0-9][A-Za-z0-9_-]*",
    task=r"[A-Za-z0-9][A-Za-z0-9_-]*",
    table="|".join(CONFIG.tables) or "-",
    figure="|".join(CONFIG.figures) or "-",


# Whether results are shared with other projects.
SHARED = workflow.workflow_settings.cache is not None
if SHARED:
    # Snakemake itself looks at the folder when the first result is to go there: after the work.
    place = os.environ.get("SNAKEMAKE_OUTPUT_CACHE", "")
    if "://" not in place and not (place and os.access(place, os.W_OK)):
        raise WorkflowError(
            "--cache: set the environment variable SNAKEMAKE_OUTPUT_CACHE to a folder that exists and can be written; "
            f"it is {place!r}"
        )


@cache
def read_index(path, changed):
    """The shards that an index names; `changed` is the time of its last change."""
    return read_shards(path)


def list_shards(dataset):
    """The shards of a dataset; waits for the checkpoint that deals the clips."""
    index = Path(checkpoints.split.get(dataset=dataset).output.index)
    return read_index(index, index.stat().st_mtime_ns)


# Each dataset has a folder of its own, and what is shown of them all another; with one dataset the two are one.
JOBS = Jobs(CONFIG, list_shards)


def declared(name):
    """A stage as the rules files need it; see `stm.stages.rules.DeclaredRule`."""
    return DeclaredRule(
        all_stages()[name],
        JOBS,
        refuse=lambda error: WorkflowError(str(error)),
        cores=workflow.resource_settings.cores,
        sharing=SHARED,
    )
