"""Where the values of packed arrays come from: for each array, how its stage's table of a shard is read.

`TABLES` names one class per array of `stm.shards.schema.ARRAYS`. Tables are sorted by key and read along with the kept clips,
a few rows at a time.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stm.jobs.status import Status
from stm.manifest import read_status
from stm.preprocess.clip_outcomes import Outcome
from stm.shards.grid import map_shape
from stm.shards.schema import ARRAYS
from stm.storage.tables import DamagedError, stream_rows

# The strictest policy first: it decides about a clip.
STRICTNESS = {"fail": 0, "drop": 1, "keep": 2}
OK = Outcome(Status.OK, "keep", "")

Row = Mapping[str, Any]
Values = NDArray[Any]


def _string(name: str) -> pa.Field:
    return pa.field(name, pa.string(), nullable=False)


def _count(name: str) -> pa.Field:
    return pa.field(name, pa.int32(), nullable=False)


class ArrayTable:
    """A table with the values of one array."""

    array: ClassVar[str]  # its name
    values: ClassVar[tuple[str, ...]]  # columns that come as flat numpy arrays
    more: ClassVar[tuple[pa.Field, ...]] = ()  # other columns that are needed

    def __init__(self, path: Path, grid: int) -> None:
        self._path = path
        self._grid = grid
        self._declared = ARRAYS[self.array]
        kind = pa.list_(pa.from_numpy_dtype(self._declared.dtype))
        columns = [pa.field(name, kind) for name in self.values]
        self._rows = stream_rows(path, self.values, schema=pa.schema([_string("key"), *self.more, *columns]))

    def read(self, clip: Row) -> dict[str, Any]:
        """The table's row of a clip; the rows between the clip before and this one are skipped.

        Raises:
            DamagedError: the table has no such row.
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

    def shape(self, clip: Row, **more: int) -> tuple[int, ...]:
        """The array's declared shape in a clip; `more` are the number of captions and sizes of its own, where it has any."""
        rows, columns = map_shape(clip["width"], clip["height"], self._grid)
        return self._declared.shape({"frames": clip["frames"], "rows": rows, "columns": columns, **more})

    def reshape(self, clip: Row, flat: Values, shape: tuple[int, ...]) -> Values:
        """A flat column in its shape.

        Raises:
            DamagedError: it has another number of values than `shape`, or values that are not finite.
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


class CaptionTable(ArrayTable):
    """A table of one caption source, which says of which captions each row was made."""

    made: ClassVar[str] = "made of"  # how, in errors: a row "was {made} other captions"
    more: ClassVar[tuple[pa.Field, ...]] = (pa.field("captions", pa.list_(pa.string()), nullable=False),)

    def find(self, clip: Row, captions: list[str]) -> Values | None:
        """The values of a clip's captions of this source, [captions, ...]; None when it has none.

        Raises:
            DamagedError: the row is missing, was made of other captions or frames, or is empty in spite of captions.
        """
        row = self.read(clip)
        where = f"{self._path}: clip {clip['video_id']!r}"
        if row["captions"] != captions:
            raise DamagedError(f"{where} was {self.made} other captions. Remove it and run again")
        if not captions:
            return None
        if row[self.values[0]] is None:
            raise DamagedError(f"{where} has captions and no {self.array}: damaged")
        return self.join(clip, row)

    def join(self, clip: Row, row: Row) -> Values:
        """The array of a row with values."""
        return self.reshape(clip, row[self.values[0]], self.shape(clip, captions=len(row["captions"])))


class ClipTable(ArrayTable):
    """A table with a status per clip; a clip that its stage could not do has no values."""

    more: ClassVar[tuple[pa.Field, ...]] = (
        _string("video_id"),
        _string("status"),
        _string("policy"),
        _string("detail"),
    )

    def find(self, clip: Row) -> tuple[Values | None, Outcome]:
        """The values of a clip, None when there are none, and what its stage says of the clip.

        Raises:
            DamagedError: the row is missing, was made from other frames, or has an unknown status or policy.
        """
        row = self.read(clip)
        values = None if any(row[name] is None for name in self.values) else self.join(clip, row)
        if row["policy"] not in STRICTNESS:
            raise DamagedError(
                f"{self._path}: clip {row['video_id']!r} has the unknown policy {row['policy']!r}: damaged"
            )
        return values, Outcome(read_status(self._path, row), row["policy"], row["detail"])

    def join(self, clip: Row, row: Row) -> Values:
        """The array of a row with values."""
        return self.reshape(clip, row[self.values[0]], self.shape(clip))


class SimilarityTable(CaptionTable):
    array = "similarity"
    values = ("similarity",)
    made = "scored against"


class TextTable(CaptionTable):
    array = "text"
    values = ("text",)
    more = (*CaptionTable.more, _count("width"))
    made = "encoded from"

    def join(self, clip: Row, row: Row) -> Values:
        shape = self.shape(clip, captions=len(row["captions"]), text_width=row["width"])
        return self.reshape(clip, row["text"], shape)


class MotionTable(ClipTable):
    array = "motion"
    values = ("magnitude", "vector")

    def join(self, clip: Row, row: Row) -> Values:
        *cells, channels = self.shape(clip)
        magnitude = self.reshape(clip, row["magnitude"], (*cells, 1))
        vector = self.reshape(clip, row["vector"], (*cells, channels - 1))
        return np.concatenate([magnitude, vector], axis=-1)


class FlowTable(ClipTable):
    array = "flow"
    values = ("forward", "backward")
    more = (_count("rows"), _count("columns"), *ClipTable.more)

    def join(self, clip: Row, row: Row) -> Values:
        rows, columns = map_shape(clip["width"], clip["height"], self._grid)
        cells = row["rows"] // rows
        if cells < 1 or (row["rows"], row["columns"]) != (rows * cells, columns * cells):
            raise DamagedError(
                f"{self._path}: clip {clip['video_id']!r} has flow of {row['rows']} x {row['columns']} cells, which "
                f"is not a multiple of the map's {rows} x {columns}: it was made with another grid. Remove it and run again"
            )
        _, *direction = self.shape(clip, flow_cells=cells)
        return np.stack([self.reshape(clip, row[name], tuple(direction)) for name in self.values])


TABLES: dict[str, type[CaptionTable] | type[ClipTable]] = {
    "flow": FlowTable,
    "motion": MotionTable,
    "similarity": SimilarityTable,
    "text": TextTable,
}
