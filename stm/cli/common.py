"""The config and the jobs that a command line selects."""

import argparse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import yaml

from stm.config import Config, ConfigError, merge, parse_config, read_files
from stm.stages.declaration import Stage
from stm.stages.jobs import Job, Jobs


def load(arguments: argparse.Namespace) -> Config:
    """The config: the files of `--config`, later ones over earlier ones, then the `--set` overrides.

    Raises:
        ConfigError: an override is malformed, or the merged config is invalid.
    """
    values = read_files(arguments.config)
    for override in arguments.set:
        key, separator, text = override.partition("=")
        if not separator:
            raise ConfigError(f"--set {override}: write key=value, for instance --set motion.backend=codec")
        try:
            value: Any = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {override}: the value is not valid YAML ({error})") from error
        for part_name in reversed(key.split(".")):
            value = {part_name: value}
        values = merge(values, value)
    return parse_config(values, ", ".join(arguments.config))


_LISTED = 20  # names in a message


def select(kind: str, requested: Sequence[str] | None, known: Iterable[str]) -> list[str]:
    """The requested names, or all known ones if none is requested.

    Raises:
        ConfigError: a requested name is unknown; the message lists the known ones, or of many those that are most like it.
    """
    names = list(known)
    unknown = [name for name in requested or () if name not in names]
    if unknown:
        raise ConfigError(f"no such {kind}: {', '.join(unknown)}; {_describe_choices(names, unknown[0])}")
    return list(requested or names)


def _describe_choices(names: Sequence[str], unknown: str) -> str:
    """All names where there are few. A dataset may have thousands of shards: then the closest, and how many there are."""
    if len(names) <= _LISTED:
        return f"there are: {', '.join(names) or 'none'}"
    closest = get_close_matches(unknown, names) or [names[0], names[-1]]
    return f"there are {len(names):,}, such as {', '.join(closest)}"


def select_jobs(stage: Stage, config: Config, selection: Mapping[str, Sequence[str] | None]) -> Iterator[Job]:
    """The jobs of a stage that the command line selects; by default all.

    Args:
        selection: the selected names by wildcard (dataset, shard, source, ...); all where None or missing.

    Raises:
        ConfigError: a name is unknown, or the stage has no job for the selection.
    """
    jobs = Jobs(config)
    known: dict[str, Iterable[str]] = {
        "run": config.runs,
        "task": config.evaluate,
        "table": config.tables,
        "figure": config.figures,
    }
    # Names are checked before the first job runs: a typo in --task must not surface after hours of work.
    for name in (name for name in stage.per if name in known):
        select(name, selection.get(name), known[name])
    datasets = select("dataset", selection.get("dataset"), config.dataset_names) if "dataset" in stage.per else [""]
    any_job = False
    for dataset in datasets:
        if "source" in stage.per:
            select("caption source", selection.get("source"), jobs.configs[dataset].captions)
        if "shard" in stage.per:
            select("shard", selection.get("shard"), jobs.list_shards(dataset))
        for job in stage.each(jobs, dataset):
            if all(getattr(job, name) in names for name, names in selection.items() if names):
                any_job = True
                yield job
    selected = ", ".join(f"{name} {' '.join(names)}" for name, names in selection.items() if names)
    if not any_job and (selected or stage.otherwise):
        raise ConfigError(": ".join(filter(None, [selected, stage.otherwise or "there is nothing to do"])))
