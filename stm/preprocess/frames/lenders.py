"""Frames of clips that another dataset of the config has stored already (`frames.from_dataset`)."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from stm.jobs.journal import Journal
from stm.jobs.status import Status
from stm.manifest import read_slice
from stm.preprocess.clip_outcomes import Note, pack_record
from stm.preprocess.frames.stage import Lender
from stm.preprocess.frames.table import FRAME_SIZES, read_jpegs, read_kept


class BorrowTask(Protocol):
    """A clip whose frames are needed."""

    @property
    def row(self) -> Mapping[str, Any]:
        """The clip's row of the manifest."""

    @property
    def item(self) -> str:
        """The clip's identifier in the journal."""


TaskT = TypeVar("TaskT", bound=BorrowTask)


def borrow_frames(title: str, tasks: Sequence[TaskT], lenders: Sequence[Lender], journal: Journal) -> list[TaskT]:
    """Put the records of the clips that a lender has into the journal, as if they had been decoded.

    A clip is the same if it is the same part of the same file. Clips that the other dataset lacks or dropped are left to be
    decoded.

    Returns:
        the tasks of those.

    Raises:
        DamagedError: a lender's files are damaged or missing.
    """
    wanted: dict[tuple[Any, ...], list[TaskT]] = {}
    for task in tasks:
        wanted.setdefault(_identify(task.row), []).append(task)
    taken = 0
    for lender in lenders:
        keys = {clip["key"]: clip for clip in read_slice(lender.slice) if _identify(clip) in wanted}
        for row in read_kept(lender.index, keys) if keys else ():
            same = wanted.pop(_identify(keys[row["key"]]), [])
            record = _make_record(lender.tar, row) if same else b""
            for task in same:
                journal.put(task.item, record)
            taken += len(same)
    if lenders:
        print(f"{title}: {taken} of {len(tasks)} clips have their frames from another dataset", file=sys.stderr)
    return [task for same in wanted.values() for task in same]


def _identify(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what a clip's frames depend on, apart from the settings: the part of the file."""
    return tuple(row.get(name) for name in ("path", "start", "end", "ends_hash"))


def _make_record(tar: Path, row: Mapping[str, Any]) -> bytes:
    """Return the record of a kept clip, from its row of the index."""
    header = {name: row[name] for name in (*FRAME_SIZES, "pts", "decode_index")}
    status = Status(row["status"])
    # Of several problems, `detail` has those that did not decide the status, too.
    notes = [] if status == Status.OK else [Note(status, row["detail"])]
    return pack_record(header, notes, read_jpegs(tar, row))
