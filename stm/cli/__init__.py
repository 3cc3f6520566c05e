"""The command line: `stm <stage>` runs the jobs of one stage without Snakemake.

It reads and writes the same paths as the workflow's rules, with the same bytes.
"""

import argparse
import errno
import json
import logging
import os
import select
import signal
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, TextIO

import stm
from stm.cli.common import add_config, load, positive, select_jobs
from stm.cli.compare import add_compare
from stm.cli.convert import add_convert
from stm.cli.difference import add_difference
from stm.cli.extras import explain_missing_library
from stm.cli.features import add_features
from stm.cli.init import add_init
from stm.cli.overview import describe_commands
from stm.cli.predict import add_predict
from stm.cli.retrieve import add_retrieve
from stm.cli.view import add_view
from stm.config import json_schema
from stm.jobs.messages import configure_messages
from stm.jobs.progress import log_duration
from stm.stages.declaration import Stage
from stm.stages.journey import all_stages
from stm.stages.provenance import check_inputs
from stm.storage.files import DISK_ERRORS
from stm.storage.machine_errors import is_machine_error

__all__ = ["build_parser", "main"]

_log = logging.getLogger(__name__)

_DESCRIPTION = (
    "Masked video and video-language pretraining, and what its weights are good for. A stage does the work of the workflow's "
    "rule of that name without Snakemake, with the same bytes. `stm COMMAND --help` lists the options of a command."
)
_SELECTIONS = {
    "dataset": "only these datasets of a config with several; default: all",
    "shard": "only these shards, for example train-00000; default: all",
    "source": "only these caption sources; default: all",
    "run": "only these pretraining runs, with all of their seeds (tube) or with one (tube-seed0); default: all",
    "task": "only these evaluations; default: all",
    "table": "only these tables; default: all",
    "figure": "only these figures; default: all",
}
# Former command names are accepted for one version, so that existing scripts keep working.
_RENAMED = {"faithfulness": "crop-agreement"}


def build_parser() -> argparse.ArgumentParser:
    """Build the argument parser: one subcommand per stage, and those that need no config, such as `view`."""
    parser = argparse.ArgumentParser(
        prog="stm",
        description=textwrap.fill(_DESCRIPTION, 80),
        formatter_class=argparse.RawDescriptionHelpFormatter,  # keeps the lines of the epilog
    )
    parser.add_argument("--version", action="version", version=f"stm {stm.__version__}")
    commands = parser.add_subparsers(dest="stage", required=True, metavar="COMMAND", help="one of those below")
    for stage in all_stages().values():
        _add_stage(commands, stage)
        if stage.name == "shards":
            verify = _add(commands, "verify", "check packed shards against their hashes", _verify)
            _add_selections(verify, ("dataset", "shard"))
    _add(commands, "schema", "print the JSON schema of the config", _print_schema)
    add_convert(commands)
    add_view(commands)
    add_features(commands)
    add_predict(commands)
    add_retrieve(commands)
    add_init(commands)
    add_difference(commands)
    add_compare(commands)
    for each in (parser, *commands.choices.values()):
        _add_levels(each)
    parser.epilog = describe_commands(commands.choices)
    parser.set_defaults(verbose=False, quiet=False)
    return parser


def _add_levels(parser: argparse.ArgumentParser) -> None:
    """Add -v and -q, which are given before or after the name of a command."""
    levels = parser.add_mutually_exclusive_group()
    more = "also print which files are read, from where, and how long it takes (STM_LOG=debug)"
    levels.add_argument("-v", "--verbose", action="store_true", default=argparse.SUPPRESS, help=more)
    less = "print warnings and errors only, and no progress (STM_LOG=warning)"
    levels.add_argument("-q", "--quiet", action="store_true", default=argparse.SUPPRESS, help=less)


def _add_stage(commands: Any, stage: Stage) -> None:
    command = _add(commands, stage.command, stage.title, lambda arguments: _run_stage(stage, arguments))
    # A run belongs to one dataset, so --run already selects the dataset.
    _add_selections(
        command, [name for name in stage.per if name in _SELECTIONS and not (name == "dataset" and "run" in stage.per)]
    )
    if stage.processes:
        command.add_argument("--processes", type=positive, default=1, help="number of worker processes; default: 1")


def _add(
    commands: Any, name: str, text: str, function: Callable[[argparse.Namespace], None]
) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, description=text)
    command.set_defaults(function=function)
    add_config(command)
    return command


def _add_selections(command: argparse.ArgumentParser, names: Sequence[str]) -> None:
    for name in names:
        command.add_argument(f"--{name}", nargs="+", help=_SELECTIONS[name])


def _run_stage(stage: Stage, arguments: argparse.Namespace) -> None:
    selection = {name: getattr(arguments, name, None) for name in _SELECTIONS if name in stage.per}
    for job in select_jobs(stage, load(arguments), selection):
        check_inputs(stage, job, all_stages())
        inputs = {} if stage.partial else stage.inputs(job)
        with log_duration("/".join(filter(None, [stage.name, *(getattr(job, name) for name in stage.per)]))):
            message = stage.run(job, inputs, stage.outputs(job), getattr(arguments, "processes", 1))
        if message:
            print(message)


def _verify(arguments: argparse.Namespace) -> None:
    from stm.shards.check import verify_shard

    selection = {"dataset": arguments.dataset, "shard": arguments.shard}
    for job in select_jobs(all_stages()["shards"], load(arguments), selection):
        tar, index = job.layout.shard_tar(job.shard), job.layout.shard(job.shard)
        verify_shard(tar, index)
        print(f"{tar}: every member has the size and hash in its index")


def _print_schema(arguments: argparse.Namespace) -> None:
    print(json.dumps(json_schema(), indent=2))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; a user error prints one message, without a traceback, and returns 2.

    Args:
        arguments: the command-line arguments after `stm`; None: those of the process.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if sys.stdout is None:  # closed by the caller; Python then ignores what is printed
        return _run(words)
    try:
        try:
            return _run(words)
        finally:
            sys.stdout.flush()  # otherwise the interpreter does it at its end, where errors cannot be handled
    except BrokenPipeError:
        if not _has_no_reader(sys.stdout):
            raise
        # The program that reads the output has ended, as in `stm schema | head -1`; what is left is not needed.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE  # as shells report it


def _has_no_reader(stream: TextIO) -> bool:
    poll = select.poll()
    poll.register(stream, 0)  # reports errors only
    return bool(poll.poll(0))


def _run(words: list[str]) -> int:
    old, renamed = words[0] if words else "", ""
    if old in _RENAMED:
        words[0] = _RENAMED[words[0]]
        renamed = f"stm {old} is now stm {words[0]}; the old name will be removed in the next version"
    parser = build_parser()
    parsed = parser.parse_args(words)
    if parsed.verbose and parsed.quiet:  # one before the command, one after
        parser.error("argument -q/--quiet: not allowed with argument -v/--verbose")
    try:
        configure_messages("debug" if parsed.verbose else "warning" if parsed.quiet else None)
        if renamed:
            _log.warning(renamed)
        status = parsed.function(parsed)
    except (ValueError, RuntimeError, OSError) as error:
        if isinstance(error, BrokenPipeError) and _has_no_reader(sys.stdout):
            raise
        text = _describe(error)
        if text is None:
            raise
        return _report(parsed.stage, text)
    except ModuleNotFoundError as error:
        advice = explain_missing_library(error)
        if advice is None:
            raise
        return _report(parsed.stage, advice)
    except KeyboardInterrupt:
        print(f"stm {parsed.stage}: interrupted", file=sys.stderr)
        return 130  # as shells report it
    return status or 0


def _report(stage: str, text: str) -> int:
    print(f"stm {stage}: {text}", file=sys.stderr)
    return 2


_HINTS = {
    errno.EACCES: "you may not read or write it",
    errno.EPERM: "you may not read or write it",
    errno.EISDIR: "it is a folder, not a file",
    errno.ENOTDIR: "a part of its path is a file, not a folder",
    errno.ENOENT: "it does not exist",
    errno.EROFS: "its file system is read-only; name a folder on another (in a config: `results`)",
    errno.ELOOP: "its links form a circle",
    errno.ENAMETOOLONG: "its name is too long",
}


def _describe(error: Exception) -> str | None:
    """The message of an error that says what is wrong and where; None for any other, a bug that needs its traceback."""
    if type(error).__module__.startswith("stm."):  # config, dataset, model, too many failures, ...
        return str(error)
    code = getattr(error, "errno", None)
    if isinstance(error, OSError) and error.filename is not None and (code in _HINTS or code not in DISK_ERRORS):
        return f"{error.filename}: {error.strerror}" + (f": {_HINTS[code]}" if code in _HINTS else "")
    return str(error) if code in DISK_ERRORS or is_machine_error(error) else None
