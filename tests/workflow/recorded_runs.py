"""A finished run without the work: empty outputs, Snakemake's metadata of them, and its criterion for rerunning a job.

A job is rerun when the `params` and the set of inputs that Snakemake recorded differ from those of the current config. Both
are compared here in this process, through Snakemake's own records: 0.1 s instead of the 2 s of a dry run.
"""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import yaml
from small_workflow import ROOT
from snakemake.api import SnakemakeApi
from snakemake.parser import parse
from snakemake.settings.types import (
    ConfigSettings,
    DAGSettings,
    ExecutionSettings,
    OutputSettings,
    Quietness,
    ResourceSettings,
)

from stm.config import Config, parse_config
from stm.layout import Layout

SHARDS = ("train-00000", "test-00000")


@dataclass(frozen=True)
class Jobs:
    """The jobs of a config by name, such as `frames` or `evaluate/tgm/linear`; with several datasets `clips:frames`."""

    names: frozenset[str]
    changed: frozenset[str]  # jobs whose params or inputs differ from the records: they and their dependents are rerun
    following: dict[str, frozenset[str]]  # by job: all jobs that depend on its outputs, directly or indirectly
    inputs: dict[str, tuple[str, ...]]  # by name: the inputs of the first shard's job, in the rule's order
    rerun: frozenset[str]  # jobs that Snakemake would run, modification times included


def finish(folder: Path, values: dict[str, Any]) -> None:
    """Make `folder` look as if the workflow had run with this config."""
    config = parse_config(values)
    for name in config.dataset_names:
        layout = Layout.of(config, name)
        for shard in SHARDS:
            touch(folder / layout.slice(shard))
        entries = {shard: {"clips": 1, "split": shard.split("-")[0]} for shard in SHARDS}
        (folder / layout.shard_index).write_text(json.dumps({"shards": entries}))
    with _workflow(folder, values) as (workflow, dag):
        workflow.execution_settings = ExecutionSettings()
        for job in dag.jobs:
            if job.benchmark:
                touch(folder / job.benchmark)
            for output in job.output:
                if output.is_directory:
                    touch(folder / output / ".snakemake_timestamp")
                else:
                    touch(folder / output)
        now = _latest(folder)
        for path in (folder / config.results).rglob("*"):
            os.utime(path, ns=(now, now))
        for job in dag.jobs:
            if job.output:
                workflow.async_run(workflow.persistence.finished(job))


def touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def _latest(folder: Path) -> int:
    """The modification time of the newest file, in nanoseconds."""
    return max(path.stat().st_mtime_ns for path in folder.rglob("*"))


def find_jobs(folder: Path, values: dict[str, Any]) -> Jobs:
    """The jobs of this config, in a folder that `finish` has prepared with this or another config."""
    prefixed = "datasets" in values and bool(values["datasets"])
    with _workflow(folder, values) as (workflow, dag):
        records = workflow.persistence
        jobs = sorted((job for job in dag.jobs if job.output), key=lambda job: str(job.output[0]))
        names = {job: _name(job, prefixed) for job in jobs}
        changed = {
            names[job]
            for job in jobs
            if not records.has_metadata(job) or records.params_changed(job) or any(records.input_changed(job))
        }
        following: dict[str, set[str]] = {name: set() for name in names.values()}
        for job in jobs:
            following[names[job]] |= {names[other] for other in _descendants(dag, job) if other in names}
        return Jobs(
            names=frozenset(names.values()),
            changed=frozenset(changed),
            following={name: frozenset(others) for name, others in following.items()},
            inputs={names[job]: tuple(map(str, job.input)) for job in reversed(jobs)},
            rerun=frozenset(names[job] for job in dag.needrun_jobs() if job in names),
        )


@contextmanager
def _workflow(folder: Path, values: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Snakemake's workflow and its DAG, with the shards known."""
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(values))
    config = parse_config(values)
    quiet = OutputSettings(quiet=frozenset([Quietness.ALL]))
    with patch("snakemake.workflow.parse", _parse_once), SnakemakeApi(quiet) as api:
        loaded = api.workflow(
            ResourceSettings(cores=1),
            ConfigSettings(configfiles=[file]),
            snakefile=ROOT / "workflow/Snakefile",
            workdir=folder,
        )
        loaded.dag(DAGSettings(targets=_targets(config)))
        workflow = loaded._workflow_store
        # The checkpoint counts as done, so that the DAG has the jobs of every shard.
        indexes = [Layout.of(config, name).shard_index.as_posix() for name in config.dataset_names]
        workflow.checkpoints.created_output.update(path for path in indexes if (folder / path).exists())
        workflow._prepare_dag(forceall=False, ignore_incomplete=True, lock_warn_only=True, nolock=True)
        workflow._build_dag()
        yield workflow, workflow.dag


_PARSED: dict[tuple[str, int], tuple[str, int, dict[int, int]]] = {}


def _parse_once(snakefile: Any, workflow: Any, linemap: dict[int, int], rulecount: int = 0) -> tuple[str, int]:
    """Snakemake's parser, called once per file: it takes half of the time, and the files do not change."""
    key = (snakefile.get_path_or_uri(secret_free=True), rulecount)
    if key not in _PARSED:
        code, count = parse(snakefile, workflow, rulecount=rulecount, linemap=linemap)
        _PARSED[key] = code, count, dict(linemap)
    code, count, lines = _PARSED[key]
    linemap.update(lines)
    return code, count


def _targets(config: Config) -> frozenset[str]:
    """Everything that the workflow can make: the default target, the demo's models, and the indexes of shards."""
    indexes = {Layout.of(config, name).shard_index.as_posix() for name in config.dataset_names}
    return frozenset({"all", "demo_models", *indexes})


def _descendants(dag: Any, job: Any) -> set[Any]:
    found: set[Any] = set()
    waiting: list[Any] = [job]
    while waiting:
        for other in dag.depending[waiting.pop()]:
            if other not in found:
                found.add(other)
                waiting.append(other)
    return found


def _name(job: Any, prefixed: bool) -> str:
    wildcards: Iterable[tuple[str, Any]] = job.wildcards_dict.items()
    parts = {key: str(value) for key, value in wildcards}
    own = [parts[key] for key in ("source", "run", "task", "table", "figure") if key in parts]
    name = "/".join([job.rule.name, *own])
    return f"{parts['dataset']}:{name}" if prefixed and "dataset" in parts else name
