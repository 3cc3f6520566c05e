"""`stm convert`: weights in the format of another library, with a model card."""

import argparse
import sys
from pathlib import Path
from typing import Any

_TEXT = "convert weights between stm, transformers, timm and VideoMAE, as a folder with a model card"
_FORMATS = ("stm", "transformers", "timm", "videomae")


def add_convert(commands: Any) -> None:
    """Add the command and its options to the parser's subcommands."""
    command = commands.add_parser("convert", description=_TEXT)
    command.set_defaults(function=_convert)
    command.add_argument(
        "weights",
        help="a safetensors file of stm, a .pth of VideoMAE, a folder of any of the formats, or a transformers hub id",
    )
    command.add_argument(
        "target", help="the folder to write, ready for upload; for stm and videomae also a file (.safetensors, .pth)"
    )
    formats = command.add_mutually_exclusive_group()
    formats.add_argument("--to", choices=_FORMATS, default="stm", help="format to write; default: stm")
    formats.add_argument("--format", choices=("official", *_FORMATS), help=argparse.SUPPRESS)
    command.add_argument(
        "--encoder-only",
        action="store_true",
        help="the video encoder without a decoder, classifier or language model",
    )
    command.add_argument(
        "--license",
        default="unknown",
        metavar="ID",
        help="the weights' licence for the model card, as the hub abbreviates it, such as apache-2.0; default: unknown",
    )


def _convert(arguments: argparse.Namespace) -> None:
    from stm.models.weights.export import RENAMED
    from stm.models.weights.zoo import convert

    to = arguments.to
    if arguments.format is not None:
        to = RENAMED.get(arguments.format, arguments.format)
        print(
            f"stm convert: --format {arguments.format} is now --to {to}; the old option will be removed in the next version",
            file=sys.stderr,
        )
    # As a string, since a hub id is not a path.
    convert(arguments.weights, Path(arguments.target), to, None, arguments.encoder_only, arguments.license)
    print(arguments.target)
