"""What is packed beside a clip's frames: its captions and maps, read from their tables a few clips at a time."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from stm.config import BadInput, Pack
from stm.manifest import Status
from stm.preprocess.caption_text import ClipCaptions
from stm.preprocess.captions import read_captions
from stm.preprocess.grid import map_shape
from stm.preprocess.outcome import Outcome
from stm.preprocess.rows import stream_rows

_STRICTNESS = {"fail": 0, "drop": 1, "keep": 2}
_OK = Outcome(Status.OK, "keep", "")

Row = Mapping[str, Any]


class ClipParts(NamedTuple):
    """What a clip has beside its frames."""

    captions: list[str]
    similarity: np.ndarray | None  # float16 [K, T, R, C]
    motion: np.ndarray | None  # float16 [T, R, C, 3]: magnitude, x, y
    outcome: Outcome  # the strictest one of the stages that made the parts


class _Aligned:
    """A table sorted by key, read along with the kept clips, which are sorted too."""

    def __init__(self, path: Path, arrays: Sequence[str]) -> None:
        self._path = path
        self._rows = stream_rows(path, arrays)

    def find(self, clip: Row) -> dict[str, Any]:
        """The table's row of a clip; rows of clips between this one and the one before are passed over.

        Raises:
            ValueError: the table has none.
        """
        for row in self._rows:
            if row["key"] == clip["key"]:
                return row
            if row["key"] > clip["key"]:
                break
        raise ValueError(
            f"{self._path}: has nothing on the kept clip {clip['video_id']!r}: it was made from other frames. Remove it "
            "and run again"
        )


def join_parts(
    kept: Sequence[Row],
    captions: Path | None,
    similarity: Path | None,
    motion: Path | None,
    pack: Pack,
    grid: int,
    bad_input: BadInput,
) -> Iterator[ClipParts]:
    """The parts of each kept clip, in order.

    Args:
        captions, similarity, motion: the stages' tables; only those that `pack` asks for are read.

    Raises:
        ValueError: a table that is needed is not given, or does not belong to these frames.
    """
    said: dict[str, ClipCaptions] | None = None
    scored = moved = None
    if pack.captions is not None:
        said = read_captions(_need(captions, "captions"))
        if pack.similarity:
            scored = _Aligned(_need(similarity, "similarity"), ("similarity",))
    if pack.motion:
        moved = _Aligned(_need(motion, "motion"), ("magnitude", "vector"))
    for row in kept:
        words, spoken = ([], _OK) if said is None else _find_captions(row, said, captions, bad_input)
        similarities = None if scored is None else _find_similarity(row, words, scored, grid, similarity)
        motions, motion_outcome = (None, _OK) if moved is None else _find_motion(row, moved, grid, motion)
        outcome = min(spoken, motion_outcome, key=lambda o: (_STRICTNESS[o.policy], o.status == Status.OK))
        yield ClipParts(words, similarities, motions, outcome)


def _need(path: Path | None, what: str) -> Path:
    if path is None:
        raise ValueError(f"pack.{what} is set, but no table of {what} was given")
    return path


def _find_captions(
    row: Row, said: Mapping[str, ClipCaptions], path: Path | None, bad_input: BadInput
) -> tuple[list[str], Outcome]:
    if row["key"] not in said:
        raise ValueError(f"{path}: has nothing on the kept clip {row['video_id']!r}: it was made from other frames")
    words, status, detail = said[row["key"]]
    return [text for _, text in words], Outcome(status, bad_input.action(status), detail)


def _find_similarity(row: Row, words: list[str], scored: _Aligned, grid: int, path: Path | None) -> np.ndarray | None:
    found = scored.find(row)
    if found["captions"] != words:
        raise ValueError(f"{path}: clip {row['video_id']!r} was scored against other captions. Remove it and run again")
    if found["similarity"] is None:
        return None
    return _shape(row, found["similarity"], (len(words),), (), grid, path)


def _find_motion(row: Row, moved: _Aligned, grid: int, path: Path | None) -> tuple[np.ndarray | None, Outcome]:
    found = moved.find(row)
    outcome = Outcome(Status(found["status"]), found["policy"], found["detail"] or "")
    if found["magnitude"] is None:
        return None, outcome
    magnitude = _shape(row, found["magnitude"], (), (1,), grid, path)
    vector = _shape(row, found["vector"], (), (2,), grid, path)
    return np.concatenate([magnitude, vector], axis=-1), outcome


def _shape(
    row: Row, flat: np.ndarray, before: tuple[int, ...], after: tuple[int, ...], grid: int, path: Path | None
) -> np.ndarray:
    """A flat map as an array [*before, T, R, C, *after]."""
    shape = (*before, row["frames"], *map_shape(row["width"], row["height"], grid), *after)
    if flat.size != np.prod(shape):
        raise ValueError(
            f"{path}: clip {row['video_id']!r} has {flat.size} values where {shape} is expected: it was made with another "
            "grid or from other frames. Remove it and run again"
        )
    return flat.reshape(shape)
