"""The clips of a set of shards, from the index beside each tar, held in compact arrays."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from stm.manifest import QUESTIONS, Question, read_questions
from stm.storage.tables import LONGEST_SIDE, DamagedError, read_table

# Arrays that a clip may carry.
MAPS = ("similarity", "motion", "flow", "text")

_COUNTS = ("frames", "width", "height", "rows", "columns")
_PLACES = tuple(f"{name}_{what}" for name in MAPS for what in ("offset", "size"))
_SIZES = ("flow_cells", "text_width")
_COLUMNS = ("key", "label", "captions", "caption_sources", "questions", *_COUNTS, "offsets", "sizes", *_PLACES, *_SIZES)

# Columns that older shards do not have; they are read as if all were null.
_LATER = ("caption_sources", "questions", "flow_offset", "flow_size", "text_offset", "text_size", *_SIZES)

_COUNT, _PLACE = pa.int32(), pa.int64()
_TYPES = {
    "key": pa.string(),
    "label": pa.string(),
    "captions": pa.list_(pa.string()),
    **dict.fromkeys((*_COUNTS, *_SIZES), _COUNT),
    "offsets": pa.list_(_PLACE),
    "sizes": pa.list_(_COUNT),
    **dict.fromkeys(_PLACES, _PLACE),
    "caption_sources": pa.list_(pa.string()),
    "questions": QUESTIONS,
}
_NEEDED = ("key", *_COUNTS, "offsets", "sizes")  # never null
_SCHEMA = pa.schema([pa.field(name, _TYPES[name], nullable=name not in _NEEDED) for name in _COLUMNS])

# Numpy pads the header of a .npy file to a multiple of 64 bytes; a map's fits into two or three such units.
HEADER_SIZES = (64, 128, 192)


@dataclass(frozen=True)
class Clip:
    """One clip of a shard, and where its members lie in the tar."""

    key: str
    tar: Path
    label: str | None
    captions: list[str]
    sources: list[str]  # of the captions; empty when the shard does not say
    questions: tuple[Question, ...]  # empty when the shard does not say
    frames: int  # stored
    width: int  # pixels
    height: int  # pixels
    rows: int  # cells of its maps
    columns: int  # cells of its maps
    flow_cells: int  # on a side of a map cell; -1: no flow
    text_width: int  # of a caption's vector; -1: none
    offsets: NDArray[np.int64]  # bytes, of each frame's JPEG
    sizes: NDArray[np.int32]  # bytes
    maps: dict[str, tuple[int, int]]  # name -> offset and size in bytes; only those that are packed

    def map_shape(self, name: str) -> tuple[int, ...]:
        """Of similarity: (captions, frames, rows, columns); of motion: (frames, rows, columns, 3); of flow: (2, frames,
        rows * flow_cells, columns * flow_cells, 2); of text: (captions, text_width).
        """
        captions, grid = len(self.captions), (self.frames, self.rows, self.columns)
        if name == "similarity":
            return (captions, *grid)
        if name == "motion":
            return (*grid, 3)
        if name == "flow":
            return (2, self.frames, self.rows * self.flow_cells, self.columns * self.flow_cells, 2)
        return (captions, self.text_width)


class ClipIndex:
    """All clips of some shards: about 12 bytes a stored frame, so 240,000 clips take some 300 MB."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """
        Args:
            paths: shard indexes (Parquet); each tar lies beside its index, with the ending `.tar`.

        Raises:
            ValueError: an index is unreadable, its tar is missing, a clip's maps do not have its shape, a
                clip occurs twice, or there are no clips at all.
        """
        self.tars = [Path(path).with_suffix(".tar") for path in paths]
        tables = [_read_index(Path(path), tar) for path, tar in zip(paths, self.tars, strict=True)]
        if sum(table.num_rows for table in tables) == 0:
            raise ValueError(f"no clips in {', '.join(str(path) for path in paths) or 'no shards at all'}")
        table = pa.concat_tables(tables)
        self._shards = np.repeat(np.arange(len(tables)), [table.num_rows for table in tables])
        self._keys, self._labels = (_join(table, name) for name in ("key", "label"))
        self._captions, self._sources = (_join(table, name) for name in ("captions", "caption_sources"))
        self._questions = _join(table, "questions")
        self._numbers = {name: _integers(_join(table, name)) for name in (*_COUNTS, *_PLACES, *_SIZES)}
        self._starts = np.concatenate([[0], np.cumsum(self._numbers["frames"])])
        self._offsets = _integers(_join(table, "offsets").flatten())
        self._sizes = _integers(_join(table, "sizes").flatten()).astype(np.int32)
        self._check_unique()

    def __len__(self) -> int:
        return len(self._shards)

    def __getitem__(self, number: int) -> Clip:
        frames = slice(self._starts[number], self._starts[number + 1])
        return Clip(
            key=self._keys[number].as_py(),
            tar=self.tars[self._shards[number]],
            label=self._labels[number].as_py(),
            captions=self._captions[number].as_py() or [],
            sources=self._sources[number].as_py() or [],
            questions=read_questions(self._questions[number].as_py()),
            **{name: int(self._numbers[name][number]) for name in (*_COUNTS, *_SIZES)},
            offsets=self._offsets[frames],
            sizes=self._sizes[frames],
            maps={name: self._place(name, number) for name in MAPS if self.packed(name, number)},
        )

    def _place(self, name: str, number: int) -> tuple[int, int]:
        return int(self._numbers[f"{name}_offset"][number]), int(self._numbers[f"{name}_size"][number])

    def packed(self, name: str, number: int) -> bool:
        """Whether a clip carries a map."""
        return bool(self._numbers[f"{name}_offset"][number] >= 0)

    def lacking(self, name: str) -> NDArray[np.int64]:
        """Numbers of the clips that do not carry a map; all of them, of a map that does not exist."""
        offsets = self._numbers.get(f"{name}_offset", np.full(len(self), -1))
        return np.flatnonzero(offsets < 0)

    def values(self, name: str) -> list[int]:
        """The values of `flow_cells` or `text_width` among the clips, ascending."""
        numbers = self._numbers[name]
        return np.unique(numbers[numbers >= 0]).tolist()

    def sources(self) -> list[str]:
        """The sources of all captions, sorted; empty when no shard says."""
        return sorted(pc.unique(self._sources.flatten()).to_pylist())

    def count_captions(self, sources: Sequence[str] | None = None) -> NDArray[np.int64]:
        """How many captions each clip has, int64 [clips]; only those of some sources, when given."""
        if sources is None:
            return _lengths(self._captions)
        wanted = pc.is_in(self._sources.flatten(), value_set=pa.array(sources, pa.string()))
        clips = pc.list_parent_indices(self._sources).to_numpy(zero_copy_only=False)
        return np.bincount(clips[wanted.to_numpy(zero_copy_only=False)], minlength=len(self))

    def labels(self) -> list[str | None]:
        """The label of each clip."""
        return self._labels.to_pylist()

    def _check_unique(self) -> None:
        key, count = Counter(self._keys.to_pylist()).most_common(1)[0]
        if count > 1:
            shards = {
                str(self.tars[self._shards[row]]) for row, other in enumerate(self._keys.to_pylist()) if other == key
            }
            where = " and ".join(str(Path(shard).with_suffix(".parquet")) for shard in sorted(shards))
            raise ValueError(
                f"{where}: clip {key!r} is in the given shards {count} times: is one of them given "
                "twice, or do two datasets that are joined have clips of one id?"
            )


def _join(table: pa.Table, name: str) -> Any:
    """A column as one Arrow array."""
    chunks = table.column(name).chunks
    return chunks[0] if len(chunks) == 1 else pa.concat_arrays(chunks)


def _integers(column: Any, missing: int = -1) -> NDArray[np.int64]:
    """An Arrow array of integers, with `missing` for null."""
    filled: NDArray[np.int64] = column.fill_null(missing).to_numpy(zero_copy_only=False).astype(np.int64)
    return filled


def _lengths(column: Any) -> NDArray[np.int64]:
    """Lengths of an Arrow array's lists; 0 for null."""
    return _integers(column.value_lengths(), missing=0)


def _read_columns(path: Path) -> pa.Table:
    """The columns of an index; those that an old one does not have are null."""
    try:
        missing = [name for name in _LATER if name not in pq.read_schema(path).names]
    except (OSError, pa.ArrowException):
        missing = []  # reading the table says what is wrong
    table = read_table(path, [name for name in _COLUMNS if name not in missing], _SCHEMA)
    for name in missing:
        table = table.append_column(name, pa.nulls(table.num_rows, _TYPES[name]))
    return table.select(_COLUMNS)


def _read_index(path: Path, tar: Path) -> pa.Table:
    table = _read_columns(path)
    if table.num_rows == 0:
        return table
    if not tar.is_file():
        raise DamagedError(f"{tar} is missing; {path} is its index. Run the stage `shards` again")
    frames = _integers(_join(table, "frames"))
    for name in ("offsets", "sizes"):
        wrong = _lengths(_join(table, name)) != frames
        _refuse(path, table, wrong, f"it has another number of {name} than of frames")
    _refuse(path, table, frames < 1, "it has no frames")
    sides = np.stack([_integers(_join(table, name)) for name in ("width", "height")])
    _refuse(path, table, np.any((sides < 1) | (sides > LONGEST_SIDE), axis=0), "its pictures have an impossible size")
    cells = np.stack([_integers(_join(table, name)) for name in ("rows", "columns")])
    _refuse(path, table, np.any((cells < 1) | (cells > sides.max(axis=0)), axis=0), "its maps have an impossible size")
    sources = _join(table, "caption_sources")
    wrong = _lengths(sources) != _lengths(_join(table, "captions"))
    wrong &= sources.is_valid().to_numpy(zero_copy_only=False)
    _refuse(path, table, wrong, "it has another number of caption sources than of captions")
    _check_maps(path, table)
    _check_places(path, table, tar)
    return table


def _check_places(path: Path, table: pa.Table, tar: Path) -> None:
    """Refuses members that lie outside the tar: a torn file is noticed now, not in the middle of an epoch."""
    size, lists = tar.stat().st_size, _join(table, "offsets")
    clips = pc.list_parent_indices(lists).to_numpy(zero_copy_only=False)
    places = [(_integers(lists.flatten()), _integers(_join(table, "sizes").flatten()), clips)]
    every = np.arange(table.num_rows)
    for name in MAPS:
        offsets, sizes = (_integers(_join(table, f"{name}_{what}")) for what in ("offset", "size"))
        present = (offsets != -1) | (sizes != -1)  # -1 for null
        places.append((offsets[present], sizes[present], every[present]))
    for offsets, sizes, owners in places:
        wrong = np.zeros(table.num_rows, dtype=np.bool_)
        wrong[owners[(offsets < 0) | (sizes < 1) | (offsets > size - sizes)]] = True
        _refuse(path, table, wrong, f"it lies outside of {tar.name}, which has {size} bytes: a torn or another file")


def _check_maps(path: Path, table: pa.Table) -> None:
    """Refuses maps that have not 2 bytes (float16) for each value."""
    counts = {name: _integers(_join(table, name)) for name in ("frames", "rows", "columns", *_SIZES)}
    captions = _lengths(_join(table, "captions"))
    cells = counts["frames"] * counts["rows"] * counts["columns"]
    values = {"similarity": captions * cells, "motion": 3 * cells, "flow": 4 * cells * counts["flow_cells"] ** 2}
    values["text"] = captions * counts["text_width"]
    for name in MAPS:
        sizes = _integers(_join(table, f"{name}_size"))
        wrong = (sizes >= 0) & ~np.isin(sizes - 2 * values[name], HEADER_SIZES)
        _refuse(
            path,
            table,
            wrong,
            f"its {name} map has another shape than the clip: was it made from other frames?",
        )


def _refuse(path: Path, table: pa.Table, wrong: NDArray[np.bool_], reason: str) -> None:
    if wrong.any():
        key = table.column("key")[int(np.flatnonzero(wrong)[0])].as_py()
        raise DamagedError(f"{path}: clip {key!r} ({wrong.sum()} in all): {reason}. Run the stage `shards` again")
