"""Frames of clips that are stored already: by another dataset (`frames.from_dataset`), or in a packed shard."""

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol, TypeVar

from stm.jobs.journal import Journal
from stm.jobs.status import Status
from stm.manifest import read_slice
from stm.preprocess.clip_outcomes import Note, pack_record
from stm.preprocess.frames.stage import Lender
from stm.preprocess.frames.table import FRAME_SIZES, are_removed, read_jpegs, read_kept
from stm.storage.tables import DamagedError, read_table

_log = logging.getLogger(__name__)


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
        packed = _PackedFrames(lender)
        for row in read_kept(lender.index, keys) if keys else ():
            clip = _identify(keys[row["key"]])
            if clip in wanted and (jpegs := _read_jpegs(lender, packed, row)) is not None:
                for task in wanted[clip]:
                    journal.put(task.item, _make_record(row, jpegs))
                taken += len(wanted.pop(clip))
    if lenders:
        _log.info(f"{title}: {taken} of {len(tasks)} clips have frames that are stored already")
    return [task for same in wanted.values() for task in same]


def _identify(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what a clip's frames depend on, apart from the settings: the part of the file."""
    return tuple(row.get(name) for name in ("path", "start", "end", "ends_hash"))


def _read_jpegs(lender: Lender, packed: "_PackedFrames", row: Mapping[str, Any]) -> list[bytes] | None:
    """Read a clip's frames, or those that were packed if they were removed; None if neither can be read."""
    try:
        if not are_removed(lender.tar):
            return read_jpegs(lender.tar, row)
    except DamagedError:
        if not are_removed(lender.tar):  # which may happen at any moment
            raise
    return packed.read(row)


class _PackedFrames:
    """The frames in a packed shard."""

    def __init__(self, lender: Lender) -> None:
        self._tar = lender.packed_tar
        self._index = lender.packed_index

    @cached_property
    def _places(self) -> dict[str, dict[str, Any]]:
        """Offsets and sizes of the frames by key; empty without a readable shard."""
        try:
            rows = read_table(self._index, ["key", "offsets", "sizes"]).to_pylist()
        except DamagedError:
            return {}
        return {row["key"]: row for row in rows}

    def read(self, row: Mapping[str, Any]) -> list[bytes] | None:
        """Read a clip's frames; None if the shard does not have them as the frames stage made them."""
        place = self._places.get(row["key"])
        if place is None or len(place["offsets"]) != row["frames"]:
            return None
        try:
            return read_jpegs(self._tar, {**row, **place})
        except DamagedError:
            return None


def _make_record(row: Mapping[str, Any], jpegs: Sequence[bytes]) -> bytes:
    """Return the record of a kept clip, from its row of the index."""
    header = {name: row[name] for name in (*FRAME_SIZES, "pts", "decode_index")}
    status = Status(row["status"])
    # Of several problems, `detail` has those that did not decide the status, too.
    notes = [] if status == Status.OK else [Note(status, row["detail"])]
    return pack_record(header, notes, jpegs)
