"""What `stm --help` says about the commands: grouped by what they are for."""

import argparse
import shutil
import textwrap
from collections.abc import Mapping

_GROUPS = {
    "videos and weights, without a config": ("view", "features", "predict", "retrieve", "convert"),
    "a study, before it runs": ("init", "plan", "rehearse"),
    "stages of a study, in the order of the data": (),  # all that are in no other group
    "a study, when it is done": ("compare", "difference", "reference"),
    "for development": ("schema", "demo-models"),
}
_NAME_WIDTH = 18


def describe_commands(commands: Mapping[str, argparse.ArgumentParser]) -> str:
    """Return a list of the commands with their descriptions, as the epilog of a parser that leaves line breaks as they are."""
    elsewhere = {name for names in _GROUPS.values() for name in names}
    stages = tuple(name for name in commands if name not in elsewhere)
    width = min(shutil.get_terminal_size().columns, 120) - 2
    parts = []
    for title, names in _GROUPS.items():
        parts.append(f"{title}:")
        parts += [_line(name, commands[name].description or "", width) for name in names or stages]
        parts.append("")
    return "\n".join(parts)


def _line(name: str, text: str, width: int) -> str:
    first = f"    {name:<{_NAME_WIDTH}}"
    return textwrap.fill(text, max(width, 60), initial_indent=first, subsequent_indent=" " * len(first))
