"""`stm <stage> …`: each stage by hand, without Snakemake, on the same paths and with the same bytes."""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import stm
from stm.cli import learning, offline
from stm.storage.files import DISK_ERRORS

__all__ = ["STAGES", "build_parser", "main"]

STAGES: dict[str, tuple[Callable[[argparse.Namespace], None], str, tuple[str, ...]]] = {
    "plan": (learning.plan, "what the run will cost, before it runs", ()),
    "generate": (offline.generate, "make the clips of moving-shapes", ("dataset", "processes")),
    "manifest": (offline.manifest, "the table of clips, and the quarantine", ("dataset", "processes")),
    "split": (offline.split, "deal the clips to shards", ("dataset",)),
    "frames": (offline.frames, "sampled frames as JPEGs", ("dataset", "shard", "processes")),
    "captions": (offline.captions, "captions, by source", ("dataset", "shard", "source")),
    "embeddings": (offline.embeddings, "patch embeddings, where the config keeps them", ("dataset", "shard")),
    "similarity": (offline.similarity, "patch-text similarity maps", ("dataset", "shard", "source")),
    "text": (offline.text, "the captions' vectors", ("dataset", "shard", "source")),
    "motion": (offline.motion, "motion maps", ("dataset", "shard", "processes")),
    "flow": (offline.flow, "optical flow", ("dataset", "shard", "processes")),
    "shards": (offline.shards, "pack WebDataset shards", ("dataset", "shard")),
    "verify": (offline.verify, "check packed shards against their hashes", ("dataset", "shard")),
    "pretrain": (learning.pretrain, "pretrain", ("run",)),
    "evaluate": (learning.evaluate, "evaluate the pretrained weights", ("run", "task")),
    "mask-quality": (learning.mask_quality, "how well masks cover the named object's true box", ("dataset",)),
    "faithfulness": (learning.faithfulness, "how true cached maps stay under random crops", ("dataset",)),
    "table": (learning.table, "a table of a paper", ("table",)),
    "figure": (learning.figure, "a figure of a paper", ("figure",)),
    "report": (learning.report, "tables, figures and the page", ()),
    "schema": (learning.schema, "print the JSON schema of the config", ()),
}

_OPTIONS: dict[str, dict[str, Any]] = {
    "dataset": {"nargs": "+", "help": "these datasets only, of a config with several; default: all"},
    "shard": {"nargs": "+", "help": "these shards only, train-00000 for instance; default: all"},
    "source": {"nargs": "+", "help": "these caption sources only; default: all"},
    "run": {"nargs": "+", "help": "these runs only; default: all"},
    "task": {"nargs": "+", "help": "these evaluations only; default: all"},
    "table": {"nargs": "+", "help": "these tables only; default: all"},
    "figure": {"nargs": "+", "help": "these figures only; default: all"},
    "processes": {"type": int, "default": 1, "help": "worker processes; default: 1"},
}


def build_parser() -> argparse.ArgumentParser:
    """The command line: one subcommand a stage."""
    parser = argparse.ArgumentParser(prog="stm", description=__doc__)
    parser.add_argument("--version", action="version", version=f"stm {stm.__version__}")
    commands = parser.add_subparsers(dest="stage", required=True, metavar="stage")
    for name, (function, text, options) in STAGES.items():
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(function=function)
        command.add_argument(
            "--config", nargs="+", default=["config/demo.yaml"], help="YAML files; later ones override"
        )
        command.add_argument(
            "--set", action="append", default=[], metavar="KEY=VALUE", help="override one key, a.b=value"
        )
        for option in options:
            command.add_argument(f"--{option}", **_OPTIONS[option])
    _add_convert(commands)
    return parser


def _add_convert(commands: Any) -> None:
    text = "weights between stm's files, official VideoMAE checkpoints and transformers folders"
    command = commands.add_parser("convert", help=text, description=text)
    command.set_defaults(function=learning.convert)
    command.add_argument("weights", help="a safetensors file of stm, an official .pth, or a transformers folder")
    command.add_argument("target", help="the file or folder to write")
    command.add_argument("--format", choices=("stm", "official", "transformers"), default="stm")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one stage; mistakes of the user are one message and exit status 2, not a traceback."""
    parsed = build_parser().parse_args(arguments)
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
