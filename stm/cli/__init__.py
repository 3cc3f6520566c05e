"""`stm <stage> …`: each stage by hand, without Snakemake, on the same paths and with the same bytes."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import stm
from stm.cli.common import jobs_of, load
from stm.config import json_schema
from stm.stages.declaration import Stage
from stm.stages.journey import all_stages
from stm.storage.files import DISK_ERRORS

__all__ = ["build_parser", "main"]

_NAMES = {
    "dataset": "these datasets only, of a config with several; default: all",
    "shard": "these shards only, train-00000 for instance; default: all",
    "source": "these caption sources only; default: all",
    "run": "these runs only; default: all",
    "task": "these evaluations only; default: all",
    "table": "these tables only; default: all",
    "figure": "these figures only; default: all",
}
# Commands that had other names, for one version.
_RENAMED = {"faithfulness": "crop-agreement"}


def build_parser() -> argparse.ArgumentParser:
    """The command line: one subcommand per stage, and a few beside them."""
    parser = argparse.ArgumentParser(prog="stm", description=__doc__)
    parser.add_argument("--version", action="version", version=f"stm {stm.__version__}")
    commands = parser.add_subparsers(dest="stage", required=True, metavar="stage")
    for stage in all_stages().values():
        _add_stage(commands, stage)
        if stage.name == "shards":
            verify = _add(commands, "verify", "check packed shards against their hashes", _verify)
            _add_names(verify, ("dataset", "shard"))
    _add(commands, "schema", "print the JSON schema of the config", _print_schema)
    _add_convert(commands)
    return parser


def _add_stage(commands: Any, stage: Stage) -> None:
    command = _add(commands, stage.command, stage.title, lambda arguments: _run_stage(stage, arguments))
    # A run says which dataset it trains on.
    _add_names(
        command, [name for name in stage.per if name in _NAMES and not (name == "dataset" and "run" in stage.per)]
    )
    if stage.processes:
        command.add_argument("--processes", type=int, default=1, help="worker processes; default: 1")


def _add(
    commands: Any, name: str, text: str, function: Callable[[argparse.Namespace], None]
) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    command.set_defaults(function=function)
    command.add_argument("--config", nargs="+", default=["config/demo.yaml"], help="YAML files; later ones override")
    command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one key, a.b=value")
    return command


def _add_names(command: argparse.ArgumentParser, names: Sequence[str]) -> None:
    for name in names:
        command.add_argument(f"--{name}", nargs="+", help=_NAMES[name])


def _add_convert(commands: Any) -> None:
    text = "weights between stm's files, official VideoMAE checkpoints and transformers folders"
    command = commands.add_parser("convert", help=text, description=text)
    command.set_defaults(function=_convert)
    command.add_argument("weights", help="a safetensors file of stm, an official .pth, or a transformers folder")
    command.add_argument("target", help="the file or folder to write")
    command.add_argument("--format", choices=("stm", "official", "transformers"), default="stm")


def _run_stage(stage: Stage, arguments: argparse.Namespace) -> None:
    wanted = {name: getattr(arguments, name, None) for name in _NAMES if name in stage.per}
    for job in jobs_of(stage, load(arguments), wanted):
        inputs = {} if stage.partial else stage.inputs(job)
        told = stage.run(job, inputs, stage.outputs(job), getattr(arguments, "processes", 1))
        if told:
            print(told)


def _verify(arguments: argparse.Namespace) -> None:
    from stm.shards.check import verify_shard

    wanted = {"dataset": arguments.dataset, "shard": arguments.shard}
    for job in jobs_of(all_stages()["shards"], load(arguments), wanted):
        tar, index = job.layout.shard_tar(job.shard), job.layout.shard(job.shard)
        verify_shard(tar, index)
        print(f"{tar}: every member has the size and hash of its index")


def _print_schema(arguments: argparse.Namespace) -> None:
    print(json.dumps(json_schema(), indent=2))


def _convert(arguments: argparse.Namespace) -> None:
    from stm.models.weights.zoo import convert

    convert(Path(arguments.weights), Path(arguments.target), arguments.format)
    print(arguments.target)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one stage; mistakes of the user are one message and exit status 2, not a traceback."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and words[0] in _RENAMED:
        print(
            f"stm {words[0]} is now stm {_RENAMED[words[0]]}; the old name goes with the next version", file=sys.stderr
        )
        words[0] = _RENAMED[words[0]]
    parsed = build_parser().parse_args(words)
    try:
        parsed.function(parsed)
    except (ValueError, RuntimeError) as error:
        # Errors of our own kinds (config, dataset, model, too many failures) are written for people; others are bugs.
        if not type(error).__module__.startswith("stm."):
            raise
        return _refuse(parsed.stage, error)
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        return _refuse(parsed.stage, error)
    return 0


def _refuse(stage: str, error: Exception) -> int:
    print(f"stm {stage}: {error}", file=sys.stderr)
    return 2
