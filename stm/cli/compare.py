"""`stm compare` and `stm reference`: results beside those of others, and results that others can compare theirs with."""

import argparse
from pathlib import Path
from typing import Any

_COMPARE = (
    "set the numbers of a results folder beside the reference results that come with stm, and say which differ; ends with 0 "
    "if they agree, 1 if not"
)
_REFERENCE = "keep tables, figures and provenance of finished results, to compare others with"


def add_compare(commands: Any) -> None:
    """Add both commands and their options to the parser's subcommands."""
    command = commands.add_parser("compare", description=_COMPARE)
    command.set_defaults(function=_compare)
    command.add_argument("results", type=Path, help="the results folder of a config, such as results/moving-shapes")
    command.add_argument(
        "--with",
        dest="reference",
        metavar="NAME",
        help="the reference: demo, tgm-small, ..., or another results folder; default: the one of the same name",
    )
    command.add_argument(
        "--other-config", action="store_true", help="compare results of different configs, where they have equal names"
    )
    command = commands.add_parser("reference", description=_REFERENCE)
    command.set_defaults(function=_reference)
    command.add_argument("results", type=Path, help="the results folder of a config, with its report")
    command.add_argument("--out", type=Path, help="the folder to write; default: reference/NAME beside the results")


def _compare(arguments: argparse.Namespace) -> int:
    from stm.report.compare import agrees, check_configs, compare, describe, read_numbers
    from stm.report.reference import ComparisonError, find_reference

    mine = read_numbers(arguments.results)
    # `absolute` keeps the name of a link, such as `results/NAME` on a larger disk.
    name = arguments.reference or arguments.results.absolute().name
    reference = find_reference(name, folders=arguments.reference is not None)
    if reference.resolve() == arguments.results.resolve():
        raise ComparisonError(f"{arguments.results} is the reference itself; name another folder with --with")
    if not arguments.other_config:
        check_configs(arguments.results, reference)
    differences = compare(mine, read_numbers(reference))
    print(describe(differences))
    return 0 if agrees(differences) else 1


def _reference(arguments: argparse.Namespace) -> None:
    from stm.report.reference import keep_reference, read_provenance

    folder = keep_reference(arguments.results, arguments.out)
    provenance = read_provenance(folder)
    print(f"{folder}: {provenance['environment']['Code']}")
    if left_out := provenance.get("figures_left_out"):
        print(f"left out, because all figures together must be at most 1 MB: {', '.join(left_out)}")
