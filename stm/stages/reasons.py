"""What Snakemake prints of jobs, in lines that one can read: the keys that have changed, and the beginnings of long lists.

Snakemake records the settings of a job as text and prints both texts when they differ, thousands of characters each; and it lists
every file of a job, of which a run or a page has thousands. Records stay as they are, so that nothing is rerun for this.
"""

import ast
import logging
import re
from collections.abc import Collection, Sequence
from contextlib import suppress
from hashlib import sha256
from importlib import import_module
from typing import Any

from stm.stages.provenance import changed_leaves, show

# The log, if a job has one, is among the indented lines that follow.
_FAILED = re.compile(
    r"^(?:Error|\w+Exception) in rule (\w+)(?:.*\n(?: +(?!log: ).*\n)* +log: (.*?)(?: \(check .*)?$)?", re.M
)
_MOST = 6  # entries of a list that are printed, or all if there are at most two more


def name_changed_keys() -> None:
    """Let Snakemake print `describe_change` of changed settings; a version with other names prints its own text instead."""
    with suppress(ImportError, AttributeError):
        change = import_module("snakemake.persistence").ParamsChange
        known = change()
        if isinstance(known.only_old, Collection) and isinstance(known.only_new, Collection):
            change.__str__ = lambda change: describe_change(change.only_old, change.only_new)


def describe_change(before: Collection[str], now: Collection[str]) -> str:
    """Name the keys in which the settings of a job differ, with both values.

    Args:
        before, now: the texts of settings as Snakemake records them; what both have is left out.
    """
    if len(before) == len(now) == 1:
        made, wanted = _parse(next(iter(before))), _parse(next(iter(now)))
        if made is not None and wanted is not None:
            changes = (
                leaf for key in {**made, **wanted} for leaf in changed_leaves(key, made.get(key), wanted.get(key))
            )
            return ", ".join(_shorten([f"{_display(key)}: {show(old)} -> {show(new)}" for key, old, new in changes]))
    return f"settings {_hash(before)} -> {_hash(now)}"


def _display(key: str) -> str:
    """A key as the user writes it, but for the name of a run or evaluation, which is among the wildcards."""
    return key.removeprefix("*.").replace("runs.{run}", "pretrain.{run}")


def _parse(text: str) -> dict[str, Any] | None:
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return None
    return value if isinstance(value, dict) else None


def _hash(texts: Collection[str]) -> str:
    return sha256("\n".join(sorted(texts)).encode()).hexdigest()[:8] if texts else "none"


def list_failures(messages: str) -> str:
    """Return a line with the rules and logs of failed jobs: others go on, so that an error may be far above the end.

    Args:
        messages: all that Snakemake has printed.
    """
    failed = dict.fromkeys(f"{rule} ({log})" if log else rule for rule, log in _FAILED.findall(messages))
    return f"Failed: {', '.join(_shorten(list(failed)))}" if failed else ""


def shorten_lists(record: logging.LogRecord) -> bool:
    """Shorten the lists of files of a message about a job, in place; a filter of Snakemake's logger, which lets all pass."""
    for name in ("input", "output"):
        files = getattr(record, name, None)
        if isinstance(files, list):
            setattr(record, name, _shorten(files))
    reason = getattr(record, "reason", None)
    if isinstance(reason, str):
        setattr(record, "reason", "; ".join(map(_shorten_files, reason.split("; "))))  # noqa: B010 (no attribute of all records)
    return True


def _shorten_files(part: str) -> str:
    """Shorten the list of files in a part of a reason, such as `Missing output files: a, b`."""
    head, colon, files = part.partition(": ")
    return head + colon + ", ".join(_shorten(files.split(", "))) if "files" in head else part


def _shorten(entries: Sequence[Any]) -> list[Any]:
    if len(entries) <= _MOST + 2:
        return list(entries)
    return [*entries[:_MOST], f"and {len(entries) - _MOST} more"]
