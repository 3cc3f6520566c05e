"""Load the config and select the jobs that a command line requests."""

import argparse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import yaml

from stm.config import Config, ConfigError, merge, parse_config, read_files
from stm.config.files import default_file, parse_yaml
from stm.layout import check_results
from stm.stages.declaration import Stage
from stm.stages.jobs import Job, Jobs


def add_config(command: argparse.ArgumentParser) -> None:
    """Add the options that `load` reads."""
    command.add_argument(
        "--config",
        nargs="+",
        metavar="FILE",
        help="YAML files, later ones override earlier ones; package:NAME.yaml is one that comes with stm; "
        "default: config/demo.yaml, or config/mine.yaml, which `stm init` writes",
    )
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override one key of the config, for example frames.every=2; may be repeated",
    )


def load(arguments: argparse.Namespace) -> Config:
    """Load and merge the files of `--config`, later ones taking precedence, then apply the `--set` overrides.

    Raises:
        ConfigError: an override is malformed, or the merged config is invalid.
    """
    files = arguments.config or [default_file("--config")]
    values = read_files(files)
    for override in arguments.set:
        key, separator, text = override.partition("=")
        if not separator or not all(key.split(".")):
            raise ConfigError(f"--set {override}: write key=value, for instance --set motion.backend=codec")
        try:
            value: Any = parse_yaml(text)
        except ConfigError as error:
            raise ConfigError(f"--set {override}: {error}") from None
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise ConfigError(f"--set {override}: the value is not valid YAML ({error})") from error
        for part_name in reversed(key.split(".")):
            value = {part_name: value}
        values = merge(values, value)
    config = parse_config(values, ", ".join(files))
    check_results(config)
    return config


def positive(text: str) -> int:
    """Parse a positive integer of the command line.

    Raises:
        ArgumentTypeError: it is not one.
    """
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, is {text!r:.40}")
    return number


_LISTED = 20  # maximum number of names in an error message


def select(kind: str, requested: Sequence[str] | None, known: Iterable[str]) -> list[str]:
    """Return the requested names, or all known names if none are requested.

    Raises:
        ConfigError: a requested name is unknown; the message lists the known names, or the closest if there are many.
    """
    names = list(known)
    unknown = [name for name in requested or () if name not in names]
    if unknown:
        raise ConfigError(f"no such {kind}: {', '.join(unknown)}; {_describe_choices(names, unknown[0])}")
    return list(requested or names)


def _describe_choices(names: Sequence[str], unknown: str) -> str:
    """List all names if there are few. A dataset may have thousands of shards: then list the closest and the total."""
    if len(names) <= _LISTED:
        return f"there are: {', '.join(names) or 'none'}"
    closest = get_close_matches(unknown, names) or [names[0], names[-1]]
    return f"there are {len(names):,}, such as {', '.join(closest)}"


def select_jobs(stage: Stage, config: Config, selection: Mapping[str, Sequence[str] | None]) -> Iterator[Job]:
    """Yield the jobs of a stage that the command line selects; all by default.

    Args:
        selection: the selected names per wildcard (dataset, shard, source, ...); None or a missing key selects all. A run
            with several seeds is named with one of them (`tube-seed0`), or without, for all (`tube`).

    Raises:
        ConfigError: a name is unknown, or no job of the stage matches the selection.
    """
    jobs = Jobs(config)
    if runs := selection.get("run"):
        seeds = [config.instances(name) if name in config.pretrain else [name] for name in runs]
        selection = {**selection, "run": [name for names in seeds for name in names]}
    known: dict[str, Iterable[str]] = {
        "run": config.runs,
        "task": config.evaluate,
        "table": config.tables,
        "figure": config.figures,
    }
    # Names are checked before the first job runs, so that a typo in --task does not surface only after hours of work.
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
