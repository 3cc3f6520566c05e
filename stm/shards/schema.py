"""The format of a packed shard: the arrays that a clip may have, and the index with one row per clip.

`ARRAYS` declares each array once; packing, checking, indexing, reading and cropping use this declaration. A new array needs an
entry here, a key in `stm.config.Pack` and a stage of the same name. Unless it has one value per cell, in a column of the same
name in the stage's table, it also needs code to read it (`stm.preprocess.packing.tables`) and, if it guides masks, code to
crop it (`stm.data.guides`). Frames (JPEGs) and questions are not arrays and have separate columns.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from stm.manifest import QUESTIONS

# A dimension of an array: an integer, the name of one of the clip's sizes, or a product of these.
Dimension = int | str | tuple[str, ...]

GRID = ("rows", "columns")  # cells of a clip's maps, along y and x
CLIP_SIZES = ("captions", "frames", *GRID)  # the sizes of every clip, whichever arrays it has

FIRST_VERSION = 1  # of the format

# Little-endian float16: 11 bits suffice for ranking tokens, and shards are half as large.
HALF = np.dtype("<f2")


@dataclass(frozen=True)
class PackedArray:
    """An array that a clip may have: the member `{key}.{name}.npy`, of shape [*layers, *layer].

    A named dimension that is not in `CLIP_SIZES` is an integer column of the index, `{array}_{what}`; it is null if the clip
    does not have the array.
    """

    name: str
    layers: tuple[Dimension, ...]  # one or two, such as captions and frames; layers are stored consecutively
    layer: tuple[Dimension, ...]  # the shape of one layer, the smallest unit that is read
    since: int  # first format version with this array; older indexes lack its columns
    guides: tuple[str, ...] = ()  # the masking guides that are computed from it
    dtype: np.dtype[Any] = HALF

    @property
    def per_source(self) -> bool:
        """Whether each caption source has a separate array; these arrays are concatenated along the captions."""
        return self.layers[0] == "captions"

    @property
    def size_columns(self) -> tuple[str, ...]:
        """The index's integer columns for the array-specific sizes."""
        names = [name for dimension in (*self.layers, *self.layer) for name in _names(dimension)]
        return tuple(dict.fromkeys(name for name in names if name not in CLIP_SIZES))

    @property
    def place_columns(self) -> tuple[str, str]:
        """The columns of the array's offset and size in the tar, in bytes; null if a clip does not have the array."""
        return f"{self.name}_offset", f"{self.name}_size"

    @property
    def columns(self) -> tuple[str, ...]:
        """The integer columns of the array in the index."""
        return (*self.size_columns, *self.place_columns)

    @property
    def checksum_column(self) -> str:
        """The column of the array's checksums, see `stm.shards.checksums`; null if a clip does not have the array."""
        return f"{self.name}_crc32"

    def shape(self, sizes: Mapping[str, Any]) -> tuple[Any, ...]:
        """The array's shape for a clip.

        Args:
            sizes: `CLIP_SIZES` and the array-specific sizes: integers, or int64 [clips] for many clips at once.
        """
        return tuple(_resolve(dimension, sizes) for dimension in (*self.layers, *self.layer))

    def count_layers(self, sizes: Mapping[str, Any]) -> tuple[Any, ...]:
        """The leading dimensions of `shape`, which count its layers."""
        return self.shape(sizes)[: len(self.layers)]

    def count_bytes(self, sizes: Mapping[str, Any]) -> Any:
        """The size of the array's values in bytes: an integer for one clip, or int64 [clips] for many."""
        return math.prod(self.shape(sizes)) * self.dtype.itemsize

    def measure(self, values: np.ndarray, sizes: Mapping[str, int]) -> dict[str, int]:
        """The array-specific sizes, by column, inferred from the shape of the values.

        Args:
            sizes: `CLIP_SIZES` of the clip that the values belong to.

        Raises:
            ValueError: the values do not have the declared dtype, or their shape does not match the declared dimensions.
        """
        own: dict[str, int] = {}
        for dimension, length in zip((*self.layers, *self.layer), values.shape, strict=False):
            for name in set(_names(dimension)) - {*sizes, *own}:
                known = [sizes[other] for other in _names(dimension) if other != name]
                own[name] = length // math.prod(known)
        if (
            values.dtype != self.dtype
            or len(own) < len(self.size_columns)
            or values.shape != self.shape({**sizes, **own})
        ):
            declared = [*self.layers, *self.layer]
            raise ValueError(
                f"the array {self.name} is {values.dtype} {list(values.shape)}, and {self.dtype} {declared} is declared "
                f"for a clip with {dict(sizes)}"
            )
        return own


def _names(dimension: Dimension) -> tuple[str, ...]:
    if isinstance(dimension, int):
        return ()
    return (dimension,) if isinstance(dimension, str) else dimension


def _resolve(dimension: Dimension, sizes: Mapping[str, Any]) -> Any:
    return dimension if isinstance(dimension, int) else math.prod(sizes[name] for name in _names(dimension))


def _declare(*arrays: PackedArray) -> dict[str, PackedArray]:
    return {array.name: array for array in arrays}


# By name, in tar order. Append new arrays at the end, so that existing members and columns keep their order.
ARRAYS = _declare(
    PackedArray(
        "flow",
        layers=(2, "frames"),  # forward, backward
        layer=(("rows", "flow_cells"), ("columns", "flow_cells"), 2),  # x, y, in map cells
        guides=("flow",),
        since=2,
    ),
    PackedArray(
        "motion",
        layers=("frames",),
        layer=(*GRID, 3),  # magnitude, x, y
        guides=("motion", "motion_compensated"),
        since=FIRST_VERSION,
    ),
    PackedArray(
        "similarity",
        layers=("captions", "frames"),
        layer=GRID,
        guides=("similarity",),
        since=FIRST_VERSION,
    ),
    PackedArray("text", layers=("captions",), layer=("text_width",), since=2),
)


def guide_arrays() -> dict[str, PackedArray]:
    """The packed array that each guide is computed from."""
    return {guide: array for array in ARRAYS.values() for guide in array.guides}


# ------------------------------------------------------------------------------------------------------- the index

# Columns added after the first version, apart from those of the arrays.
_LATER = ("caption_sources", "questions", "crc32")


def size_columns() -> tuple[str, ...]:
    """The integer columns that determine the arrays' shapes."""
    return tuple(name for array in ARRAYS.values() for name in array.size_columns)


def later_columns() -> tuple[str, ...]:
    """The columns that indexes of the first version lack."""
    later = [array.columns for array in ARRAYS.values() if array.since > FIRST_VERSION]
    return (*_LATER, *(name for columns in later for name in columns), *checksum_columns())


def checksum_columns() -> tuple[str, ...]:
    """The columns of the arrays' checksums."""
    return tuple(array.checksum_column for array in ARRAYS.values())


def shard_schema() -> pa.Schema:
    """The schema of an index."""
    places = [name for array in ARRAYS.values() for name in array.place_columns]
    return pa.schema(
        [
            pa.field("key", pa.string(), nullable=False),
            pa.field("video_id", pa.string(), nullable=False),
            pa.field("split", pa.string(), nullable=False),
            pa.field("label", pa.string()),
            pa.field("captions", pa.list_(pa.string()), nullable=False),
            pa.field("caption_sources", pa.list_(pa.string()), nullable=False),  # of each caption
            pa.field("questions", QUESTIONS),
            pa.field("frames", pa.int32(), nullable=False),
            pa.field("width", pa.int32(), nullable=False),  # pixels
            pa.field("height", pa.int32(), nullable=False),
            pa.field("rows", pa.int32(), nullable=False),  # of the maps
            pa.field("columns", pa.int32(), nullable=False),
            *(pa.field(name, pa.int32()) for name in size_columns()),
            pa.field("pts", pa.list_(pa.float64()), nullable=False),  # seconds
            pa.field("json_offset", pa.int64(), nullable=False),  # bytes from the start of the tar
            pa.field("json_size", pa.int64(), nullable=False),
            pa.field("offsets", pa.list_(pa.int64()), nullable=False),  # of the JPEGs
            pa.field("sizes", pa.list_(pa.int32()), nullable=False),
            pa.field("crc32", pa.list_(pa.uint32()), nullable=False),  # of the JPEGs
            *(pa.field(name, pa.list_(pa.uint32())) for name in checksum_columns()),
            *(pa.field(name, pa.int64()) for name in places),
            pa.field("sha256", pa.list_(pa.string()), nullable=False),  # of the clip's members, in the order of the tar
        ]
    )


def clip_sizes(row: Mapping[str, Any]) -> dict[str, int]:
    """The sizes that determine the shapes of a clip's arrays, from its index row; 0 for those of missing arrays."""
    sizes = {name: row[name] or 0 for name in ("frames", *GRID, *size_columns())}
    return {"captions": len(row["captions"]), **sizes}


def list_members(row: Mapping[str, Any]) -> list[tuple[str, int, int]]:
    """The (name, offset, size) of a clip's members, in tar order, from its index row.

    Raises:
        ValueError: the row has different numbers of JPEG offsets and sizes.
    """
    key = row["key"]
    jpegs: Sequence[tuple[int, int]] = list(zip(row["offsets"], row["sizes"], strict=True))
    members = [(f"{key}.json", row["json_offset"], row["json_size"])]
    members += [(f"{key}.{number:04d}.jpg", offset, size) for number, (offset, size) in enumerate(jpegs)]
    for array in ARRAYS.values():
        offset, size = (row[column] for column in array.place_columns)
        if offset is not None:
            members.append((f"{key}.{array.name}.npy", offset, size))
    return members
