"""`stm predict`: the classes of videos of one's own, by a fine-tuned classifier."""

import argparse
from pathlib import Path
from typing import Any

from stm.cli.common import positive
from stm.cli.features import add_clip_options, add_inputs, read_settings

_TEXT = "print the most probable classes of videos, or of packed clips, by a fine-tuned classifier"


def add_predict(commands: Any) -> None:
    """Add the command and its options to the parser's subcommands."""
    command = commands.add_parser("predict", description=_TEXT)
    command.set_defaults(function=_predict)
    add_inputs(command)
    command.add_argument("--top", type=positive, default=5, help="classes per video; default: 5")
    command.add_argument(
        "--classes", type=Path, help="file with one class name per line, for weights without names (published ones)"
    )
    command.add_argument("--out", type=Path, help="also write a table: .csv, .parquet or .json")
    own = "those of the classifier's evaluation"
    add_clip_options(command, f"{own}, or 5", f"{own}, or 3")


def _predict(arguments: argparse.Namespace) -> int:
    from stm.features import predict
    from stm.features.prediction import format_predictions

    predictions = predict(
        arguments.weights,
        arguments.inputs,
        arguments.out,
        read_settings(arguments),
        top=arguments.top,
        classes=arguments.classes,
        root=arguments.root,
    )
    for line in format_predictions(predictions):
        print(line)
    return 0 if all(each.classes for each in predictions) else 1
