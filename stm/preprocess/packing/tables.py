"""Readers of the stage tables that packed arrays come from.

A table that stores an array's values as declared, in a column named after the array, does not need a dedicated class;
the classes of all other tables are in `TABLES`. Tables are sorted by key, so they are streamed in lockstep with the
kept clips, a few rows at a time.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stm.manifest import read_status
from stm.preprocess.clip_outcomes import STRICTNESS, Outcome
from stm.shards.grid import map_shape
from stm.shards.schema import PackedArray
from stm.storage.tables import DamagedError, stream_rows

Row = Mapping[str, Any]
Values = NDArray[Any]


def _string(name: str) -> pa.Field:
    return pa.field(name, pa.string(), nullable=False)


def _count(name: str) -> pa.Field:
    return pa.field(name, pa.int32(), nullable=False)


class ArrayTable:
    """A table with the values of one array."""

    # Columns to read as flat numpy arrays; by default, the column named after the array.
    values: ClassVar[tuple[str, ...]] = ()
    extra: ClassVar[tuple[pa.Field, ...]] = ()  # additional columns to read

    def __init__(self, array: PackedArray, path: Path, grid: int) -> None:
        self._path = path
        self._grid = grid
        self._declared = array
        self._columns = self.values or (array.name,)
        kind = pa.list_(pa.from_numpy_dtype(self._declared.dtype))
        columns = [pa.field(name, kind) for name in self._columns]
        self._rows = stream_rows(path, self._columns, schema=pa.schema([_string("key"), *self.extra, *columns]))

    def read(self, clip: Row) -> dict[str, Any]:
        """Return the table's row for a clip, skipping the rows of clips that are not packed.

        Raises:
            DamagedError: the table has no row for the clip.
        """
        for row in self._rows:
            if row["key"] == clip["key"]:
                return row
            if row["key"] > clip["key"]:
                break
        raise DamagedError(
            f"{self._path}: has no row for the kept clip {clip['video_id']!r}: it was made from different frames. Remove it "
            "and run again"
        )

    def shape(self, clip: Row, **sizes: int) -> tuple[int, ...]:
        """Return the declared shape of a clip's array; `sizes`: caption count and array-specific sizes."""
        rows, columns = map_shape(clip["width"], clip["height"], self._grid)
        return self._declared.shape({"frames": clip["frames"], "rows": rows, "columns": columns, **sizes})

    def reshape(self, clip: Row, flat: Values, shape: tuple[int, ...]) -> Values:
        """Reshape a flat column.

        Raises:
            DamagedError: the number of values in the column does not match `shape`, or some values are not finite.
        """
        if flat.size != np.prod(shape):
            raise DamagedError(
                f"{self._path}: clip {clip['video_id']!r} has {flat.size} values where {shape} is expected: it was made "
                "with a different grid or from different frames. Remove it and run again"
            )
        if not np.isfinite(flat).all():
            raise DamagedError(
                f"{self._path}: clip {clip['video_id']!r} has values that are not finite. Remove it and run again"
            )
        return flat.reshape(shape)


class CaptionTable(ArrayTable):
    """A table of one caption source, which records the captions that each row was made from."""

    made: ClassVar[str] = "made from"  # verb for errors: a row "was {made} different captions"
    extra: ClassVar[tuple[pa.Field, ...]] = (pa.field("captions", pa.list_(pa.string()), nullable=False),)

    def find(self, clip: Row, captions: list[str]) -> Values | None:
        """Return the values for a clip's captions from this source, [captions, ...], or None if there are no captions.

        Raises:
            DamagedError: the row is missing, was made from different captions or frames, or has captions but no values.
        """
        row = self.read(clip)
        where = f"{self._path}: clip {clip['video_id']!r}"
        if row["captions"] != captions:
            raise DamagedError(f"{where} was {self.made} different captions. Remove it and run again")
        if not captions:
            return None
        if row[self._columns[0]] is None:
            raise DamagedError(
                f"{where} has captions but no {self._declared.name}: the table is damaged. Remove it and run again"
            )
        return self.join(clip, row)

    def join(self, clip: Row, row: Row) -> Values:
        """Reshape the values of a row that has values."""
        return self.reshape(clip, row[self._columns[0]], self.shape(clip, captions=len(row["captions"])))


class ClipTable(ArrayTable):
    """A table with one status per clip; a clip for which the stage failed has no values."""

    extra: ClassVar[tuple[pa.Field, ...]] = (
        _string("video_id"),
        _string("status"),
        _string("policy"),
        _string("detail"),
    )

    def find(self, clip: Row) -> tuple[Values | None, Outcome]:
        """Return the values of a clip, or None, and the outcome recorded by its stage.

        Raises:
            DamagedError: the row is missing, was made from different frames, or has an unknown status or policy.
        """
        row = self.read(clip)
        values = None if any(row[name] is None for name in self._columns) else self.join(clip, row)
        if row["policy"] not in STRICTNESS:
            raise DamagedError(
                f"{self._path}: clip {row['video_id']!r} has the unknown policy {row['policy']!r}: damaged. "
                "Remove the table and run again"
            )
        return values, Outcome(read_status(self._path, row), row["policy"], row["detail"])

    def join(self, clip: Row, row: Row) -> Values:
        """Reshape the values of a row that has values."""
        return self.reshape(clip, row[self._columns[0]], self.shape(clip))


class SimilarityTable(CaptionTable):
    made = "scored against"


class TextTable(CaptionTable):
    extra = (*CaptionTable.extra, _count("width"))
    made = "encoded from"

    def join(self, clip: Row, row: Row) -> Values:
        shape = self.shape(clip, captions=len(row["captions"]), text_width=row["width"])
        return self.reshape(clip, row["text"], shape)


class MotionTable(ClipTable):
    values = ("magnitude", "vector")

    def join(self, clip: Row, row: Row) -> Values:
        *cells, channels = self.shape(clip)
        magnitude = self.reshape(clip, row["magnitude"], (*cells, 1))
        vector = self.reshape(clip, row["vector"], (*cells, channels - 1))
        return np.concatenate([magnitude, vector], axis=-1)


class FlowTable(ClipTable):
    values = ("forward", "backward")
    extra = (_count("rows"), _count("columns"), *ClipTable.extra)

    def join(self, clip: Row, row: Row) -> Values:
        rows, columns = map_shape(clip["width"], clip["height"], self._grid)
        cells = row["rows"] // rows
        if cells < 1 or (row["rows"], row["columns"]) != (rows * cells, columns * cells):
            raise DamagedError(
                f"{self._path}: clip {clip['video_id']!r} has flow of {row['rows']} x {row['columns']} cells, which "
                f"is not a multiple of the map's {rows} x {columns}: it was made with a different grid. Remove it and run again"
            )
        _, *direction = self.shape(clip, flow_cells=cells)
        return np.stack([self.reshape(clip, row[name], tuple(direction)) for name in self.values])


TABLES: dict[str, type[CaptionTable] | type[ClipTable]] = {
    "flow": FlowTable,
    "motion": MotionTable,
    "similarity": SimilarityTable,
    "text": TextTable,
}


def table_of(array: PackedArray) -> type[CaptionTable] | type[ClipTable]:
    """Return the class that reads an array's table."""
    return TABLES.get(array.name) or (CaptionTable if array.per_source else ClipTable)
