"""`stm difference`: whether two runs of a study differ, on the same test clips."""

import argparse
from typing import Any

from stm.cli.common import add_config, load, positive

_TEXT = "the difference of two runs in an evaluation, with its paired interval over seeds and test clips"


def add_difference(commands: Any) -> None:
    """Add the command and its options to the parser's subcommands."""
    command = commands.add_parser("difference", help=_TEXT, description=_TEXT)
    command.set_defaults(function=_difference)
    add_config(command)
    command.add_argument("task", help="an evaluation of the config")
    command.add_argument("first", help="a run, with all of its seeds (tube) or with one (tube-seed0)")
    command.add_argument("second", help="the run that is subtracted")
    command.add_argument(
        "--metric", metavar="KEY", help="in metrics.json, such as reranked.text_to_video.r5; default: the headline"
    )
    command.add_argument(
        "--beyond",
        nargs=2,
        default=[],
        metavar="RUN",
        help="two more runs, whose difference is subtracted from that of the first two",
    )
    for name, text in (("seeds", "seeds"), ("clips", "test clips")):
        command.add_argument(
            f"--{name}",
            type=positive,
            help=f"{text} of a study to plan, whose runs and clips vary as here; default: as many as here",
        )


def _difference(arguments: argparse.Namespace) -> None:
    from stm.report.pairs import compare_runs, plan

    runs = [arguments.first, arguments.second, *arguments.beyond]
    found = compare_runs(load(arguments), arguments.task, runs, arguments.metric)
    beyond = " - ({} - {})".format(*arguments.beyond) if arguments.beyond else ""
    what = " ".join(filter(None, (arguments.task, arguments.metric)))
    print(f"{arguments.first} - {arguments.second}{beyond}, {what}: {found.describe()}")
    print(plan(found, arguments.seeds, arguments.clips))
