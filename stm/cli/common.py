"""What the commands share: the config of the command line, and the names that it may choose among."""

import argparse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import yaml

from stm.config import Config, ConfigError, merge, parse_config, read_files
from stm.stages.declaration import Stage
from stm.stages.jobs import Job, Jobs


def load(arguments: argparse.Namespace) -> Config:
    """The config files of the command line, later ones over earlier ones, then the --set overrides."""
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


def chosen(what: str, wanted: Sequence[str] | None, known: Iterable[str]) -> list[str]:
    """The names asked for, or all; an unknown one is an error that lists what there is."""
    names = list(known)
    unknown = [name for name in wanted or () if name not in names]
    if unknown:
        raise ConfigError(f"no such {what}: {', '.join(unknown)}; there are: {', '.join(names) or 'none'}")
    return list(wanted or names)


def jobs_of(stage: Stage, config: Config, wanted: Mapping[str, Sequence[str] | None]) -> Iterator[Job]:
    """The jobs of a stage that the command line asks for: all by default.

    Args:
        wanted: by wildcard; None or missing: all.

    Raises:
        ConfigError: a name is unknown, or the stage has nothing to do for what was asked.
    """
    jobs = Jobs(config)
    kinds: dict[str, Iterable[str]] = {
        "run": config.runs,
        "task": config.evaluate,
        "table": config.tables,
        "figure": config.figures,
    }
    for name in (name for name in stage.per if name in kinds):
        chosen(name, wanted.get(name), kinds[name])
    datasets = chosen("dataset", wanted.get("dataset"), config.dataset_names) if "dataset" in stage.per else [""]
    found = False
    for dataset in datasets:
        if "source" in stage.per:
            chosen("caption source", wanted.get("source"), jobs.configs[dataset].captions)
        if "shard" in stage.per:
            chosen("shard", wanted.get("shard"), jobs.list_shards(dataset))
        for job in stage.each(jobs, dataset):
            if all(getattr(job, name) in names for name, names in wanted.items() if names):
                found = True
                yield job
    asked = ", ".join(f"{name} {' '.join(names)}" for name, names in wanted.items() if names)
    if not found and (asked or stage.otherwise):
        raise ConfigError(": ".join(filter(None, [asked, stage.otherwise or "there is nothing to do"])))
