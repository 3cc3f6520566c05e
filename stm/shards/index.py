"""Loads the clips of a set of shards into compact arrays, from the index next to each tar."""

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

from stm.manifest import Question, read_questions
from stm.shards.checksums import count_checksums
from stm.shards.schema import (
    ARRAYS,
    GRID,
    PackedArray,
    later_columns,
    shard_schema,
    size_columns,
)
from stm.storage.tables import LONGEST_SIDE, DamagedError, explain_unreadable, read_receipt, read_table

_COUNTS = ("frames", "width", "height", "rows", "columns")
_UNREAD = {"video_id", "split", "pts", "json_offset", "json_size"}  # columns that training does not need
_NEEDED = ("key", *_COUNTS, "offsets", "sizes")  # never null

# Numpy pads the header of a .npy file to a multiple of 64 bytes; the headers of these arrays are 64 to 192 bytes long.
HEADER_SIZES = (64, 128, 192)


@dataclass(frozen=True)
class Clip:
    """One clip of a shard, and the locations of its members in the tar."""

    key: str
    tar: Path
    label: str | None
    captions: list[str]
    sources: list[str]  # of each caption; empty in shards of the first version
    questions: tuple[Question, ...]
    frames: int  # stored frames
    width: int  # pixels
    height: int  # pixels
    rows: int  # cells of its maps
    columns: int
    offsets: NDArray[np.int64]  # of each frame's JPEG, in bytes
    sizes: NDArray[np.int32]  # of each frame's JPEG, in bytes
    arrays: dict[str, tuple[int, int]]  # name -> offset and size in bytes; packed arrays only
    array_sizes: dict[str, int]  # array-specific sizes, such as "flow_cells"; packed arrays only
    similarity_window: int  # cells per side of the patches whose similarity is packed
    checksums: NDArray[np.uint32]  # CRC-32 of each frame's JPEG; empty in shards that were packed without them
    array_checksums: dict[str, NDArray[np.uint32]]  # see `stm.shards.checksums`; packed arrays only
    sha256: list[str]  # of all members in tar order, in shards that were packed without checksums; otherwise empty

    def member_sha256(self, suffix: int | str) -> str:
        """The SHA-256 of a frame, given its position, or of an array, given its name, in a clip without checksums."""
        arrays = list(self.arrays)  # in tar order, after the JSON and the frames
        place = suffix if isinstance(suffix, int) else self.frames + arrays.index(suffix)
        return self.sha256[1 + place]

    def array_shape(self, name: str) -> tuple[int, ...]:
        """The shape of a packed array, see `stm.shards.schema.ARRAYS`."""
        return ARRAYS[name].shape(self._sizes())

    def count_layers(self, name: str) -> tuple[int, ...]:
        """The leading dimensions of a packed array, which count its layers."""
        return ARRAYS[name].count_layers(self._sizes())

    def _sizes(self) -> dict[str, int]:
        own = {"captions": len(self.captions), "frames": self.frames, "rows": self.rows, "columns": self.columns}
        return own | self.array_sizes


class _Lists:
    """A list column of integers as one flat array; null is an empty list."""

    def __init__(self, column: Any) -> None:
        self._starts = np.concatenate([[0], np.cumsum(_lengths(column))])
        self._flat: NDArray[np.uint32] = column.flatten().to_numpy(zero_copy_only=False).astype(np.uint32)

    def __getitem__(self, row: int) -> NDArray[np.uint32]:
        return self._flat[self._starts[row] : self._starts[row + 1]]


class ClipIndex:
    """All clips of a set of shards; 100,000 clips of 63 stored frames, with all arrays, need about 220 MB."""

    def __init__(self, paths: Sequence[Path], *, streamed: bool = False) -> None:
        """
        Args:
            paths: shard indexes (Parquet); each is next to its tar, which has the suffix `.tar`.
            streamed: whether the tars are elsewhere: neither their presence nor their size is checked.

        Raises:
            ValueError: an index is unreadable, its tar is missing, a clip's arrays have the wrong size, a clip occurs twice,
                or there are no clips at all.
        """
        self.tars = [Path(path).with_suffix(".tar") for path in paths]
        tables = [
            _read_index(Path(path), None if streamed else tar) for path, tar in zip(paths, self.tars, strict=True)
        ]
        if sum(table.num_rows for table in tables) == 0:
            raise ValueError(f"no clips in {', '.join(str(path) for path in paths) or 'no shards at all'}")
        # In the receipts, because a shard's maps are all made with one window, and nearly always with that of one cell.
        self._windows = [read_receipt(Path(path)).get("similarity_window", 1) for path in paths]
        table = pa.concat_tables(tables)
        self._shards = np.repeat(np.arange(len(tables)), [table.num_rows for table in tables])
        self._keys = _join(table, "key")
        self._labels = _join(table, "label")
        self._captions = _join(table, "captions")
        self._sources = _join(table, "caption_sources")
        self._questions = _join(table, "questions")
        numbers = [*_COUNTS, *(name for array in ARRAYS.values() for name in array.columns)]
        self._numbers = {name: _integers(_join(table, name)) for name in numbers}
        # The offsets and sizes of all clips are in two flat arrays; each clip's frames are a slice of them.
        self._starts = np.concatenate([[0], np.cumsum(self._numbers["frames"])])
        self._offsets = _integers(_join(table, "offsets").flatten())
        self._sizes = _integers(_join(table, "sizes").flatten()).astype(np.int32)
        self._checksums = _Lists(_join(table, "crc32"))
        self._array_checksums = {array.name: _Lists(_join(table, array.checksum_column)) for array in ARRAYS.values()}
        self._sha256 = _join(table, "sha256")
        self._check_unique()

    def __len__(self) -> int:
        return len(self._shards)

    def __getitem__(self, number: int) -> Clip:
        number = range(len(self))[number]  # negative numbers count from the end, as in a list
        frames = slice(self._starts[number], self._starts[number + 1])
        packed = [array for array in ARRAYS.values() if self.packed(array.name, number)]
        return Clip(
            key=self._keys[number].as_py(),
            tar=self.tars[self._shards[number]],
            label=self._labels[number].as_py(),
            captions=self._captions[number].as_py() or [],
            sources=self._sources[number].as_py() or [],
            questions=read_questions(self._questions[number].as_py()),
            **{name: int(self._numbers[name][number]) for name in _COUNTS},
            offsets=self._offsets[frames],
            sizes=self._sizes[frames],
            arrays={array.name: self._place(array, number) for array in packed},
            array_sizes={name: int(self._numbers[name][number]) for array in packed for name in array.size_columns},
            similarity_window=self._windows[self._shards[number]],
            checksums=self._checksums[number],
            array_checksums={array.name: self._array_checksums[array.name][number] for array in packed},
            sha256=self._sha256[number].as_py() or [],
        )

    def _place(self, array: PackedArray, number: int) -> tuple[int, int]:
        offset, size = array.place_columns
        return int(self._numbers[offset][number]), int(self._numbers[size][number])

    def packed(self, name: str, number: int) -> bool:
        """Whether the clip at index `number` has the array `name`."""
        offset, _ = ARRAYS[name].place_columns
        return bool(self._numbers[offset][number] >= 0)

    def lacking(self, name: str) -> NDArray[np.int64]:
        """Indices of the clips without the array `name`, int64, ascending."""
        offset, _ = ARRAYS[name].place_columns
        return np.flatnonzero(self._numbers[offset] < 0)

    def values(self, name: str) -> list[int]:
        """The distinct values of an array-specific size, such as `flow_cells`, over all clips, ascending."""
        numbers = self._numbers[name]
        return np.unique(numbers[numbers >= 0]).tolist()

    def sources(self) -> list[str]:
        """The sources of all captions, sorted; empty if no shard names them."""
        return sorted(pc.unique(self._sources.flatten()).to_pylist())

    def count_captions(self, sources: Sequence[str] | None = None) -> NDArray[np.int64]:
        """The number of captions per clip, int64 [clips], from the given sources or from all."""
        if sources is None:
            return _lengths(self._captions)
        counted = pc.is_in(self._sources.flatten(), value_set=pa.array(sources, pa.string()))
        clips = pc.list_parent_indices(self._sources).to_numpy(zero_copy_only=False)
        return np.bincount(clips[counted.to_numpy(zero_copy_only=False)], minlength=len(self))

    def count_clips(self) -> NDArray[np.int64]:
        """The number of clips of each shard, int64 [shards]."""
        return np.bincount(self._shards, minlength=len(self.tars))

    def labels(self) -> list[str | None]:
        """The label of each clip."""
        return self._labels.to_pylist()

    def captions(self) -> list[list[str]]:
        """The captions of each clip, from all sources."""
        return [captions or [] for captions in self._captions.to_pylist()]

    def _check_unique(self) -> None:
        key, count = Counter(self._keys.to_pylist()).most_common(1)[0]
        if count > 1:
            shards = {
                str(self.tars[self._shards[row]]) for row, other in enumerate(self._keys.to_pylist()) if other == key
            }
            where = " and ".join(str(Path(shard).with_suffix(".parquet")) for shard in sorted(shards))
            raise ValueError(
                f"{where}: clip {key!r} is in the given shards {count} times: is one of them given "
                "twice, or do two of the joined datasets have clips with the same id?"
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
    """Lengths of the lists in an Arrow array; 0 for null."""
    return _integers(column.value_lengths(), missing=0)


def _index_schema() -> pa.Schema:
    """The schema of the columns to read."""
    fields = [field for field in shard_schema() if field.name not in _UNREAD]
    return pa.schema([field.with_nullable(field.name not in _NEEDED) for field in fields])


def _read_columns(path: Path) -> pa.Table:
    """The columns of an index; columns that an older index lacks are null."""
    schema = _index_schema()
    try:
        present = pq.read_schema(path).names
    except (OSError, pa.ArrowException) as error:
        raise explain_unreadable(path, error) from error
    missing = [name for name in later_columns() if name not in present]
    if missing and (unknown := [name for name in present if name not in shard_schema().names]):
        # Parquet has no checksum of its footer: a damaged name must not be taken for an older index without the column.
        raise DamagedError(
            f"{path}: has a column {unknown[0]!r} and none `{missing[0]}`; remove the tar and its index and run again"
        )
    if "crc32" not in missing:
        missing.append("sha256")  # of whole members: needed only if parts have no checksums, and large
    table = read_table(path, [name for name in schema.names if name not in missing], schema)
    # Null columns allow older shards to be read together with new ones.
    for name in missing:
        table = table.append_column(name, pa.nulls(table.num_rows, schema.field(name).type))
    return table.select(schema.names)


def _read_index(path: Path, tar: Path | None) -> pa.Table:
    table = _read_columns(path)
    if table.num_rows == 0:
        return table
    if tar is not None and not tar.is_file():
        raise DamagedError(f"{tar} is missing; remove its index, {path}, and run the stage `shards` again")
    _check_order(path, table)
    _check_counts(path, table)
    _check_sides(path, table)
    _check_arrays(path, table)
    if tar is not None:
        _check_places(path, table, tar)
    _check_checksums(path, table)
    return table


def _check_order(path: Path, table: pa.Table) -> None:
    """Reject clips in another order than that of their keys, in which they are packed: it decides what a batch contains."""
    keys = _join(table, "key")
    behind = pc.less(keys[1:], keys[:-1]).to_numpy(zero_copy_only=False)
    _refuse(path, table, np.concatenate([[False], behind]), "it is not in the order of the keys")


def _check_counts(path: Path, table: pa.Table) -> None:
    """Reject lists that do not have one entry per frame or per caption."""
    frames = _integers(_join(table, "frames"))
    for name in ("offsets", "sizes"):
        _refuse_unequal(path, table, (_lengths(_join(table, name)), name), (frames, "frames"))
    _refuse(path, table, frames < 1, "it has no frames")
    sources = _join(table, "caption_sources")
    captions = _lengths(_join(table, "captions"))
    named = sources.is_valid().to_numpy(zero_copy_only=False)  # null in indexes of the first version
    counts = np.where(named, _lengths(sources), captions)
    _refuse_unequal(path, table, (counts, "caption sources"), (captions, "captions"))


def _check_sides(path: Path, table: pa.Table) -> None:
    """Reject impossible frame and grid sizes."""
    sides = np.stack([_integers(_join(table, name)) for name in ("width", "height")])
    cells = np.stack([_integers(_join(table, name)) for name in GRID])
    _refuse(path, table, np.any((sides < 1) | (sides > LONGEST_SIDE), axis=0), "its frames have an impossible size")
    _refuse(path, table, np.any((cells < 1) | (cells > sides.max(axis=0)), axis=0), "its maps have an impossible size")


def _check_places(path: Path, table: pa.Table, tar: Path) -> None:
    """Reject members that extend beyond the tar, so that a truncated file is detected now and not in the middle of an epoch."""
    size = tar.stat().st_size
    lists = _join(table, "offsets")
    clips = pc.list_parent_indices(lists).to_numpy(zero_copy_only=False)
    places = [(_integers(lists.flatten()), _integers(_join(table, "sizes").flatten()), clips)]
    every = np.arange(table.num_rows)
    for array in ARRAYS.values():
        offsets, sizes = (_integers(_join(table, name)) for name in array.place_columns)
        present = (offsets != -1) | (sizes != -1)  # -1 for null
        places.append((offsets[present], sizes[present], every[present]))
    for offsets, sizes, owners in places:
        wrong = np.zeros(table.num_rows, dtype=np.bool_)
        wrong[owners[(offsets < 0) | (sizes < 1) | (offsets > size - sizes)]] = True
        _refuse(
            path,
            table,
            wrong,
            f"it lies outside of {tar.name}, which has {size} bytes: it is truncated, or another file",
        )


def _array_sizes(table: pa.Table) -> dict[str, NDArray[np.int64]]:
    """The sizes that determine the shapes of the arrays, int64 [clips] each."""
    sizes = {name: _integers(_join(table, name)) for name in ("frames", *GRID, *size_columns())}
    return sizes | {"captions": _lengths(_join(table, "captions"))}


def _check_arrays(path: Path, table: pa.Table) -> None:
    """Reject arrays whose size in bytes is not that of a header plus the values."""
    sizes = _array_sizes(table)
    for array in ARRAYS.values():
        stored = _integers(_join(table, array.place_columns[1]))
        wrong = ~np.isin(stored - array.count_bytes(sizes), HEADER_SIZES)
        for name in array.size_columns:
            wrong |= sizes[name] < 1
        wrong &= stored >= 0  # -1 for null
        reason = f"the shape of its {array.name} array does not match the clip: it may be from different frames"
        _refuse(path, table, wrong, reason)


def _check_checksums(path: Path, table: pa.Table) -> None:
    """Reject clips some of whose members could not be checked: each needs its checksums, or all of them their SHA-256."""
    packed = [_integers(_join(table, array.place_columns[0])) >= 0 for array in ARRAYS.values()]
    frames = _integers(_join(table, "frames"))
    summed = _join(table, "crc32").is_valid().to_numpy(zero_copy_only=False)
    counts = np.where(summed, _lengths(_join(table, "crc32")), frames)
    _refuse_unequal(path, table, (counts, "checksums"), (frames, "frames"))
    members = 1 + frames + np.sum(packed, axis=0, dtype=np.int64)
    hashes = np.where(summed, members, _lengths(_join(table, "sha256")))
    _refuse_unequal(path, table, (hashes, "hashes"), (members, "members"))
    sizes = _array_sizes(table)
    for array, present in zip(ARRAYS.values(), packed, strict=True):
        needed = np.where(present & summed, count_checksums(array, sizes), 0)
        found = np.where(present & summed, _lengths(_join(table, array.checksum_column)), 0)
        _refuse_unequal(path, table, (found, f"{array.name} checksums"), (needed, "parts"))


def _refuse_unequal(
    path: Path, table: pa.Table, actual: tuple[NDArray[np.int64], str], expected: tuple[NDArray[np.int64], str]
) -> None:
    """Reject clips for which two counts differ; each count is given with its unit."""
    wrong = actual[0] != expected[0]
    if wrong.any():
        first = int(np.flatnonzero(wrong)[0])
        _refuse(path, table, wrong, f"it has {actual[0][first]} {actual[1]} for {expected[0][first]} {expected[1]}")


def _refuse(path: Path, table: pa.Table, wrong: NDArray[np.bool_], reason: str) -> None:
    if wrong.any():
        key = table.column("key")[int(np.flatnonzero(wrong)[0])].as_py()
        raise DamagedError(
            f"{path}: clip {key!r} ({wrong.sum()} in all): {reason}; remove the tar and its index and run again"
        )
