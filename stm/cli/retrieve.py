"""`stm retrieve`: the videos of a folder that fit a text."""

import argparse
from pathlib import Path
from typing import Any

from stm.cli.common import positive
from stm.cli.features import add_clip_options, read_settings

_TEXT = "print the videos of a folder that fit a text best, by a run that was trained with text"


def add_retrieve(commands: Any) -> None:
    """Add the command and its options to the parser's subcommands."""
    command = commands.add_parser("retrieve", description=_TEXT)
    command.set_defaults(function=_retrieve)
    command.add_argument("weights", help="a run's folder or weights.safetensors, with `language` or `contrast`")
    command.add_argument("text", help="what the videos show")
    command.add_argument("folder", help="a folder of videos; also a list of videos, or packed shards")
    command.add_argument("--text", dest="more", action="append", default=[], help="a further text; may be repeated")
    command.add_argument("--top", type=positive, default=5, help="videos per text; default: 5")
    command.add_argument(
        "--index",
        type=Path,
        help="table in which the videos' vectors are kept; default: FOLDER.stm-retrieve.parquet, beside the folder",
    )
    command.add_argument(
        "--text-model",
        help="text encoder of a run with `contrast`, as text.model of a config; default: the one named in the weights",
    )
    command.add_argument(
        "--text-pooling", choices=("projected", "cls", "mean"), help="as text.pooling of a config; default: projected"
    )
    add_clip_options(command, "1", "1; the whole frame for runs with `language`")


def _retrieve(arguments: argparse.Namespace) -> None:
    from stm.features import retrieve

    texts = [arguments.text, *arguments.more]
    found = retrieve(
        arguments.weights,
        texts,
        [arguments.folder],
        read_settings(arguments),
        top=arguments.top,
        index=arguments.index,
        text_model=arguments.text_model,
        text_pooling=arguments.text_pooling,
        root=arguments.root,
    )
    for text, matches in zip(texts, found, strict=True):
        print(text)
        for match in matches:
            print(f"  {match.score:7.4f}  {match.video}")
