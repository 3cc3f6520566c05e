"""The tables of features: one row per window, or per video, written as a stream of row groups."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stm.features.settings import FeatureError
from stm.storage.tables import read_receipt, read_table, write_rows

_GROUP_BYTES = 2**24  # of features per row group
_GROUP_ROWS = 1024


def features_schema(values: int, dtype: str, dated: bool = False) -> pa.Schema:
    """The columns of a table of features.

    Args:
        values: numbers per feature.
        dtype: float32 or float16.
        dated: whether there is a column with the time at which each file was modified, in ns.
    """
    return pa.schema(
        [
            pa.field("video", pa.string(), nullable=False),
            pa.field("path", pa.string(), nullable=False),
            pa.field("window", pa.int32()),  # null for a video without features
            pa.field("start", pa.float64()),  # s since the start of the file: time of the first frame
            pa.field("end", pa.float64()),  # time of the last frame
            pa.field("frames", pa.list_(pa.int32())),  # 0: the first frame of the video, or of its part
            pa.field("status", pa.string(), nullable=False),
            pa.field("detail", pa.string(), nullable=False),
            pa.field("bytes", pa.int64()),  # of the file
            *([pa.field("modified", pa.int64())] if dated else []),
            pa.field("feature", pa.list_(pa.from_numpy_dtype(np.dtype(dtype)), values)),
        ]
    )


def write_features(
    path: Path, schema: pa.Schema, rows: Iterable[Mapping[str, Any]], receipt: Mapping[str, Any]
) -> None:
    """Atomically write rows, whose `feature` is an array or None, to a Parquet file, some megabytes at a time."""
    kind = schema.field("feature").type
    size = kind.list_size * kind.value_type.bit_width // 8
    write_rows(path, schema, rows, receipt, max(1, min(_GROUP_ROWS, _GROUP_BYTES // size)))


class FeatureTable(NamedTuple):
    """The rows of a table that have features."""

    rows: pa.Table  # all columns but `feature`
    features: NDArray[Any]  # [rows, D], or [rows, slots, N, D] per token
    receipt: dict[str, Any]


def read_features(path: str | Path) -> FeatureTable:
    """Read a table of features; rows of videos without any are left out.

    Raises:
        FeatureError: the file is not a table of features.
        DamagedError: it cannot be read.
    """
    path = Path(path)
    receipt = read_receipt(path)
    shape = receipt.get("shape")
    if not isinstance(shape, list):
        raise FeatureError(f"{path}: not a table of `stm features`")
    table = read_table(path)
    table = table.filter(table.column("feature").is_valid())
    column = table.column("feature").combine_chunks()
    flat = column.flatten().to_numpy(zero_copy_only=False) if len(table) else np.zeros(0, np.float32)
    return FeatureTable(table.drop_columns(["feature"]), flat.reshape(len(table), *shape), receipt)
