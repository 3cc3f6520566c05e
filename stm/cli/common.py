"""What the commands share: the config of the command line, and the names that it may choose among."""

import argparse
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from stm.config import Config, ConfigError, merge, parse_config, read_files
from stm.layout import Layout
from stm.manifest import read_shards, split_of


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


def corpora(arguments: argparse.Namespace) -> Iterator[tuple[Config, Layout]]:
    """The config and folder of each dataset that the command line asks for: all by default."""
    config = load(arguments)
    for name in chosen("dataset", arguments.dataset, config.dataset_names):
        yield config.of(name), Layout.of(config, name)


def chosen(what: str, wanted: Sequence[str] | None, known: Iterable[str]) -> list[str]:
    """The names asked for, or all; an unknown one is an error that lists what there is."""
    names = list(known)
    unknown = [name for name in wanted or () if name not in names]
    if unknown:
        raise ConfigError(f"no such {what}: {', '.join(unknown)}; there are: {', '.join(names) or 'none'}")
    return list(wanted or names)


def all_shards(layout: Layout, split: str | None = None) -> list[str]:
    """The shards of a split, or of all."""
    if not layout.shard_index.exists():
        raise ConfigError(f"{layout.shard_index} does not exist yet; run `stm manifest` and `stm split` first")
    return [shard for shard in read_shards(layout.shard_index) if split in (None, split_of(shard))]


def shards_of(arguments: argparse.Namespace, layout: Layout) -> list[str]:
    return chosen("shard", arguments.shard, all_shards(layout))


def packed(layout: Layout, split: str) -> list[Path]:
    """Index files of a split's packed shards."""
    return [layout.shard(shard) for shard in all_shards(layout, split)]


def each_shard(arguments: argparse.Namespace) -> Iterator[tuple[Config, Layout, str]]:
    """Every shard that the command line asks for, with its dataset's config and folder."""
    for config, layout in corpora(arguments):
        for shard in shards_of(arguments, layout):
            yield config, layout, shard


def each_source(arguments: argparse.Namespace) -> Iterator[tuple[Config, Layout, str, str]]:
    """Every caption source and shard that the command line asks for."""
    for config, layout in corpora(arguments):
        for source in chosen("caption source", arguments.source, config.captions):
            for shard in shards_of(arguments, layout):
                yield config, layout, source, shard
