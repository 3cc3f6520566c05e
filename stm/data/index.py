"""The clips of a set of shards, from the index beside each tar, held in compact arrays."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stm.files import read_table

GUIDES = ("similarity", "motion")

_COUNTS = ("frames", "width", "height", "rows", "columns")
_PLACES = tuple(f"{guide}_{what}" for guide in GUIDES for what in ("offset", "size"))
_COLUMNS = ("key", "label", "captions", *_COUNTS, "offsets", "sizes", *_PLACES)

# Numpy pads the header of a .npy file to a multiple of 64 bytes; a map's fits into two or three such units.
HEADER_SIZES = (64, 128, 192)


@dataclass(frozen=True)
class Clip:
    """One clip of a shard, and where its members lie in the tar."""

    key: str
    tar: Path
    label: str | None
    captions: list[str]
    frames: int  # stored
    width: int  # pixels
    height: int  # pixels
    rows: int  # cells of its maps
    columns: int  # cells of its maps
    offsets: NDArray[np.int64]  # bytes, of each frame's JPEG
    sizes: NDArray[np.int32]  # bytes
    maps: dict[str, tuple[int, int]]  # guide -> offset and size in bytes; only those that are packed

    def map_shape(self, guide: str) -> tuple[int, ...]:
        """Of similarity: (captions, frames, rows, columns); of motion: (frames, rows, columns, 3)."""
        grid = (self.frames, self.rows, self.columns)
        return (len(self.captions), *grid) if guide == "similarity" else (*grid, 3)


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
        self._keys, self._labels, self._captions = (_join(table, name) for name in ("key", "label", "captions"))
        self._numbers = {name: _integers(_join(table, name)) for name in (*_COUNTS, *_PLACES)}
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
            **{name: int(self._numbers[name][number]) for name in _COUNTS},
            offsets=self._offsets[frames],
            sizes=self._sizes[frames],
            maps={guide: self._place(guide, number) for guide in GUIDES if self.packed(guide, number)},
        )

    def _place(self, guide: str, number: int) -> tuple[int, int]:
        return int(self._numbers[f"{guide}_offset"][number]), int(self._numbers[f"{guide}_size"][number])

    def packed(self, guide: str, number: int) -> bool:
        """Whether a clip carries a map."""
        return bool(self._numbers[f"{guide}_offset"][number] >= 0)

    def lacking(self, guide: str) -> NDArray[np.int64]:
        """Numbers of the clips that do not carry a map; all of them, of a guide that does not exist."""
        offsets = self._numbers.get(f"{guide}_offset", np.full(len(self), -1))
        return np.flatnonzero(offsets < 0)

    def labels(self) -> list[str | None]:
        """The label of each clip."""
        return self._labels.to_pylist()

    def _check_unique(self) -> None:
        key, count = Counter(self._keys.to_pylist()).most_common(1)[0]
        if count > 1:
            raise ValueError(f"clip {key!r} is in the given shards {count} times: is one of them given twice?")


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


def _read_index(path: Path, tar: Path) -> pa.Table:
    table = read_table(path, _COLUMNS)
    if table.num_rows == 0:
        return table
    if not tar.is_file():
        raise ValueError(f"{tar} is missing; {path} is its index. Run the stage `shards` again")
    counts = {name: _integers(_join(table, name)) for name in ("frames", "rows", "columns")}
    for name in ("offsets", "sizes"):
        wrong = _lengths(_join(table, name)) != counts["frames"]
        _refuse(path, table, wrong, f"it has another number of {name} than of frames")
    _refuse(path, table, counts["frames"] < 1, "it has no frames")
    cells = counts["frames"] * counts["rows"] * counts["columns"]
    _check_maps(path, table, cells)
    return table


def _check_maps(path: Path, table: pa.Table, cells: NDArray[np.int64]) -> None:
    """Refuses maps that have not 2 bytes (float16) for each value: `cells` of them in each layer."""
    layers = {"similarity": _lengths(_join(table, "captions")), "motion": np.full_like(cells, 3)}
    for guide in GUIDES:
        sizes = _integers(_join(table, f"{guide}_size"))
        wrong = (sizes >= 0) & ~np.isin(sizes - 2 * cells * layers[guide], HEADER_SIZES)
        _refuse(
            path,
            table,
            wrong,
            f"its {guide} map has another shape than the clip: was it made from other frames?",
        )


def _refuse(path: Path, table: pa.Table, wrong: NDArray[np.bool_], reason: str) -> None:
    if wrong.any():
        key = table.column("key")[int(np.flatnonzero(wrong)[0])].as_py()
        raise ValueError(f"{path}: clip {key!r} ({wrong.sum()} in all): {reason}. Run the stage `shards` again")
