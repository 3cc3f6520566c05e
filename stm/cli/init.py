"""`stm init`: a folder with what a study of one's own starts from."""

import argparse
import importlib.util
import os
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from stm.config import ConfigError, read_values
from stm.storage.shipped import PACKAGE, shipped, shipped_configs

CONFIG, SNAKEFILE, PROFILES = "config/mine.yaml", "workflow/Snakefile", "workflow/profiles"
_SNAKEFILE = """\
# The workflow of the installed stm; rules of your own can follow.
from stm.storage.shipped import shipped


include: shipped("workflow/Snakefile").as_posix()


rule study:
    default_target: True
    input:
        rules.all.input,
"""
_HEADER = """\
# A study of your own. What this file does not set is as in the config {name}.yaml, which comes with stm.
#
#   snakemake plan --cores 1        what it will cost, before it runs
#   snakemake rehearse --cores 2    all of it in minutes, with small models and a few clips
#   snakemake --cores 8             the study; on a cluster with --workflow-profile {profiles}/slurm
#
# Paths are relative to the folder in which snakemake runs. Any key can be set here, for example
#   pretrain: {{{run}: {{workers: 8}}}}

extends: {package}{name}.yaml
"""


def add_init(commands: Any) -> None:
    """Add the command to the parser of `stm`."""
    text = "write a config, a Snakefile and profiles into a folder, to start a study of your own from"
    command = commands.add_parser("init", description=text)
    command.set_defaults(function=_init)
    command.add_argument("folder", type=Path, help="the folder; it may exist, and no file in it is overwritten")
    command.add_argument(
        "--config",
        default="folder",
        metavar="NAME",
        help="the config of stm that yours extends: folder (your own videos; the default), demo, tgm, ...",
    )


def _init(arguments: argparse.Namespace) -> None:
    name = str(arguments.config).removeprefix(PACKAGE).removesuffix(".yaml")
    if name not in shipped_configs():
        raise ConfigError(f"--config {arguments.config}: must be one of {', '.join(shipped_configs())}")
    files = dict(_files(name))
    # Snakemake prefers a Snakefile in the folder itself to the one in workflow/.
    # A link counts even if it leads nowhere: the file would be written where it leads.
    taken = [str(path) for file in ("Snakefile", *files) if os.path.lexists(path := arguments.folder / file)]
    if taken:
        raise ConfigError(f"{', '.join(taken)}: exists already, and nothing is overwritten; name another folder")
    for file, text in files.items():
        path = arguments.folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    print(_describe(arguments.folder, name))


def _files(name: str) -> Iterator[tuple[str, str]]:
    """Yield the files of a study that extends a shipped config, and their texts."""
    yield CONFIG, write_config(name)
    yield SNAKEFILE, _SNAKEFILE
    profiles = shipped(PROFILES)
    for path in sorted(profiles.glob("*/*.yaml")):
        yield f"{PROFILES}/{path.relative_to(profiles).as_posix()}", path.read_text(encoding="utf-8")


def write_config(name: str) -> str:
    """Return the text of a config that extends a shipped one: its name, and where its data lies."""
    values = read_values(f"{PACKAGE}{name}.yaml")
    run = next(run for run in values["pretrain"] if not run.startswith("."))
    own = {"name": values["name"], "results": values["results"]} | _paths(values)
    header = _HEADER.format(name=name, run=run, profiles=PROFILES, package=PACKAGE)
    return header + yaml.safe_dump(own, sort_keys=False)


def _paths(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a config that say where the data of its datasets lies."""
    if "dataset" in values:
        return _paths_of(values)
    # A dataset that is set to null is left out of an extended config.
    datasets = {name: paths for name, one in values["datasets"].items() if one and (paths := _paths_of(one))}
    return {"datasets": datasets} if datasets else {}


def _paths_of(values: Mapping[str, Any]) -> dict[str, Any]:
    paths = {key: values["dataset"][key] for key in ("root", "annotations") if key in values["dataset"]}
    return {"dataset": paths} if paths else {}


def _describe(folder: Path, name: str) -> str:
    extended = shipped("config") / f"{name}.yaml"
    has_data = bool(_paths(read_values(extended)))
    lines = [
        f"{folder} has {CONFIG}, which extends stm's own {name}.yaml ({extended}), {SNAKEFILE} and {PROFILES}/.",
        f"Say in {CONFIG} where your data lies, and then:" if has_data else "Next:",
        *([] if folder.resolve() == Path.cwd() else [f"  cd {shlex.quote(str(folder))}"]),
        "  snakemake plan --cores 1        # what it will cost",
        "  snakemake rehearse --cores 2    # all of it in minutes, at small size",
        "  snakemake --cores 8             # the study",
    ]
    if importlib.util.find_spec("snakemake") is None:
        lines.append("Snakemake is not installed: pip install 'stm-video[workflow]'")
    return "\n".join(lines)
