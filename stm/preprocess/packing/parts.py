"""What is packed beside a clip's frames: its captions, maps and vectors, read from their tables a few clips at a time."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stm.config import BadInput, Pack
from stm.jobs.status import Status
from stm.manifest import read_status
from stm.preprocess.captions.stage import read_captions
from stm.preprocess.clip_outcomes import Outcome
from stm.shards.grid import map_shape
from stm.storage.tables import DamagedError, stream_rows

_STRICTNESS = {"fail": 0, "drop": 1, "keep": 2}
_OK = Outcome(Status.OK, "keep", "")

Row = Mapping[str, Any]
Half = NDArray[np.float16]


@dataclass(frozen=True)
class Tables:
    """The stages' tables of one shard; by caption source where there is one for each."""

    captions: Mapping[str, Path] = field(default_factory=dict)
    similarity: Mapping[str, Path] = field(default_factory=dict)
    motion: Path | None = None
    flow: Path | None = None
    text: Mapping[str, Path] = field(default_factory=dict)


class ClipParts(NamedTuple):
    """What a clip has beside its frames; K captions, of all sources, in the order of the sources."""

    captions: list[str]
    sources: list[str]  # of each caption
    similarity: Half | None  # [K, T, R, C]
    motion: Half | None  # [T, R, C, 3]: magnitude, x, y
    flow: Half | None  # [2, T, R * cells, C * cells, 2]: forward and backward; x, y
    text: Half | None  # [K, D]
    outcome: Outcome  # the strictest one of the stages that made the parts


def join_parts(kept: Sequence[Row], tables: Tables, pack: Pack, grid: int, bad_input: BadInput) -> Iterator[ClipParts]:
    """The parts of each kept clip, in order.

    A clip that some of the sources have no caption for keeps those of the others; their outcome counts when it has no
    caption at all, or when the policy for it is `fail`.

    Args:
        tables: only those that `pack` asks for are read.

    Raises:
        DamagedError: a table that is needed is torn, or does not belong to these frames.
    """
    sources = [_Source(name, tables, pack, grid, bad_input) for name in pack.sources]
    moved = _Motion(_need(tables.motion, "motion"), grid) if pack.motion else None
    flowing = _Flow(_need(tables.flow, "flow"), grid) if pack.flow else None
    for row in kept:
        said = [source.find(row) for source in sources]
        motion, motion_outcome = moved.find(row) if moved else (None, _OK)
        flow, flow_outcome = flowing.find(row) if flowing else (None, _OK)
        yield ClipParts(
            [text for part in said for text in part.captions],
            [part.source for part in said for _ in part.captions],
            _concatenate([part.similarity for part in said]),
            motion,
            flow,
            _concatenate([part.text for part in said]),
            _strictest([_spoken(said), motion_outcome, flow_outcome]),
        )


def _strictest(outcomes: Sequence[Outcome]) -> Outcome:
    return min(outcomes, key=lambda o: (_STRICTNESS[o.policy], o.status == Status.OK))


def _need(path: Path | None, what: str) -> Path:
    if path is None:
        raise ValueError(f"pack.{what} is set, but no table of {what} was given")
    return path


def _concatenate(arrays: Sequence[Half | None]) -> Half | None:
    """Arrays of several sources one after another along K; sources without captions have none."""
    present = [array for array in arrays if array is not None]
    if len({array.shape[1:] for array in present}) > 1:  # maps of one clip always agree, vectors need not
        raise DamagedError(
            f"text vectors of {' and '.join(str(array.shape[-1]) for array in present)} numbers are to be packed "
            "together: they are of different text encoders. Remove the text tables and run again"
        )
    return np.concatenate(present) if present else None


# ---------------------------------------------------------------------------------------------- one table each


def _string(name: str) -> pa.Field:
    return pa.field(name, pa.string(), nullable=False)


def _count(name: str) -> pa.Field:
    return pa.field(name, pa.int32(), nullable=False)


_OUTCOME = (_string("video_id"), _string("status"), _string("policy"), _string("detail"))


class _Table:
    """A table sorted by key, read along with the kept clips, which are sorted too."""

    arrays: tuple[str, ...]  # columns that come as flat numpy arrays
    more: tuple[pa.Field, ...] = ()  # other columns that are needed

    def __init__(self, path: Path, grid: int) -> None:
        self._path, self._grid = path, grid
        arrays = [pa.field(name, pa.list_(pa.float16())) for name in self.arrays]
        self._rows = stream_rows(path, self.arrays, schema=pa.schema([_string("key"), *self.more, *arrays]))

    def read(self, clip: Row) -> dict[str, Any]:
        """The table's row of a clip; rows of clips between this one and the one before are passed over.

        Raises:
            DamagedError: the table has none.
        """
        for row in self._rows:
            if row["key"] == clip["key"]:
                return row
            if row["key"] > clip["key"]:
                break
        raise DamagedError(
            f"{self._path}: has nothing on the kept clip {clip['video_id']!r}: it was made from other frames. Remove it "
            "and run again"
        )

    def shape(self, clip: Row, flat: NDArray[Any], shape: tuple[int, ...]) -> Half:
        """A flat column as an array.

        Raises:
            DamagedError: it has another size, or values that are no numbers.
        """
        if flat.size != np.prod(shape):
            raise DamagedError(
                f"{self._path}: clip {clip['video_id']!r} has {flat.size} values where {shape} is expected: it was made "
                "with another grid or from other frames. Remove it and run again"
            )
        if not np.isfinite(flat).all():
            raise DamagedError(
                f"{self._path}: clip {clip['video_id']!r} has values that are not finite. Remove it and run again"
            )
        return flat.reshape(shape)

    def outcome(self, found: Row) -> Outcome:
        if found["policy"] not in _STRICTNESS:
            raise DamagedError(f"{self._path}: clip {found['video_id']!r} has no policy that is known: damaged")
        return Outcome(read_status(self._path, found), found["policy"], found["detail"])

    def size(self, clip: Row) -> tuple[int, int, int]:
        """[T, R, C] of a clip's maps."""
        return clip["frames"], *map_shape(clip["width"], clip["height"], self._grid)

    def check_captions(self, clip: Row, found: Row, words: list[str], made: str) -> None:
        """Refuses a row that was made of other captions, or that has nothing in spite of captions."""
        if found["captions"] != words:
            raise DamagedError(
                f"{self._path}: clip {clip['video_id']!r} was {made} other captions. Remove it and run again"
            )
        if words and found[self.arrays[0]] is None:
            raise DamagedError(f"{self._path}: clip {clip['video_id']!r} has captions and no {self.arrays[0]}: damaged")


class _Similarity(_Table):
    arrays = ("similarity",)
    more = (pa.field("captions", pa.list_(pa.string()), nullable=False),)

    def find(self, clip: Row, words: list[str]) -> Half | None:
        found = self.read(clip)
        self.check_captions(clip, found, words, "scored against")
        return self.shape(clip, found["similarity"], (len(words), *self.size(clip))) if words else None


class _Text(_Table):
    arrays = ("text",)
    more = (pa.field("captions", pa.list_(pa.string()), nullable=False), _count("width"))

    def find(self, clip: Row, words: list[str]) -> Half | None:
        found = self.read(clip)
        self.check_captions(clip, found, words, "encoded from")
        return self.shape(clip, found["text"], (len(words), found["width"])) if words else None


class _Motion(_Table):
    arrays = ("magnitude", "vector")
    more = _OUTCOME

    def find(self, clip: Row) -> tuple[Half | None, Outcome]:
        found = self.read(clip)
        if found["magnitude"] is None or found["vector"] is None:
            return None, self.outcome(found)
        magnitude = self.shape(clip, found["magnitude"], (*self.size(clip), 1))
        vector = self.shape(clip, found["vector"], (*self.size(clip), 2))
        return np.concatenate([magnitude, vector], axis=-1), self.outcome(found)


class _Flow(_Table):
    arrays = ("forward", "backward")
    more = (_count("rows"), _count("columns"), *_OUTCOME)

    def find(self, clip: Row) -> tuple[Half | None, Outcome]:
        found = self.read(clip)
        if found["forward"] is None or found["backward"] is None:
            return None, self.outcome(found)
        frames, rows, columns = self.size(clip)
        cells = found["rows"] // rows
        if cells < 1 or (found["rows"], found["columns"]) != (rows * cells, columns * cells):
            raise DamagedError(
                f"{self._path}: clip {clip['video_id']!r} has flow of {found['rows']} x {found['columns']} cells, which "
                f"is no multiple of the map's {rows} x {columns}: it was made with another grid. Remove it and run again"
            )
        shape = (frames, rows * cells, columns * cells, 2)
        return np.stack([self.shape(clip, found[name], shape) for name in self.arrays]), self.outcome(found)


# -------------------------------------------------------------------------------------------- a caption source


class _Said(NamedTuple):
    """What one source has on a clip."""

    source: str
    captions: list[str]
    similarity: Half | None
    text: Half | None
    outcome: Outcome


def _spoken(said: Sequence[_Said]) -> Outcome:
    """The sources' outcome: `ok` as soon as one has a caption, unless another's says `fail`."""
    if not said:
        return _OK
    speaking = any(part.captions for part in said)
    return _strictest([s.outcome for s in said if s.captions or not speaking or s.outcome.policy == "fail"])


class _Source:
    """The tables of one caption source."""

    def __init__(self, name: str, tables: Tables, pack: Pack, grid: int, bad_input: BadInput) -> None:
        self._name, self._bad_input = name, bad_input
        self._path = _need(tables.captions.get(name), "captions")
        self._said = read_captions(self._path)
        self._scored = _Similarity(_need(tables.similarity.get(name), "similarity"), grid) if pack.similarity else None
        self._encoded = _Text(_need(tables.text.get(name), "text"), grid) if pack.text else None

    def find(self, clip: Row) -> _Said:
        if clip["key"] not in self._said:
            raise DamagedError(
                f"{self._path}: has nothing on the kept clip {clip['video_id']!r}: it was made from other frames"
            )
        spoken, status, detail = self._said[clip["key"]]
        words = [text for _, text in spoken]
        similarity = self._scored.find(clip, words) if self._scored else None
        text = self._encoded.find(clip, words) if self._encoded else None
        return _Said(self._name, words, similarity, text, Outcome(status, self._bad_input.action(status), detail))
