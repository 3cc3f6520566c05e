"""The index of a shard: one row a clip, and where each of its members lies in the tar."""

from typing import Any

import pyarrow as pa

from stm.manifest import QUESTIONS

ARRAYS = ("flow", "motion", "similarity", "text")  # members `{key}.{name}.npy`, in the order of the tar

SHARD_SCHEMA = pa.schema(
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
        pa.field("flow_cells", pa.int32()),  # flow cells on a side of a map's cell; null: no flow
        pa.field("text_width", pa.int32()),  # of a caption's vector; null: no vectors
        pa.field("pts", pa.list_(pa.float64()), nullable=False),  # seconds
        pa.field("json_offset", pa.int64(), nullable=False),  # bytes from the start of the tar
        pa.field("json_size", pa.int64(), nullable=False),
        pa.field("offsets", pa.list_(pa.int64()), nullable=False),  # of the JPEGs
        pa.field("sizes", pa.list_(pa.int32()), nullable=False),
        *(pa.field(f"{name}_{what}", pa.int64()) for name in ARRAYS for what in ("offset", "size")),  # null: not packed
        pa.field("sha256", pa.list_(pa.string()), nullable=False),  # of the clip's members, in the order of the tar
    ]
)


def list_members(row: dict[str, Any]) -> list[tuple[str, int, int]]:
    """(name, offset, size) of a clip's members, in the order of the tar, from its line of the index."""
    key = row["key"]
    jpegs = zip(row["offsets"], row["sizes"], strict=True)
    places = [(f"{key}.json", row["json_offset"], row["json_size"])]
    places += [(f"{key}.{number:04d}.jpg", offset, size) for number, (offset, size) in enumerate(jpegs)]
    present = [name for name in ARRAYS if row[f"{name}_offset"] is not None]
    return places + [(f"{key}.{name}.npy", row[f"{name}_offset"], row[f"{name}_size"]) for name in present]


def array_shapes(row: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shape of each of a clip's arrays, all float16, from its line of the index; packed or not."""
    frames, rows, columns = row["frames"], row["rows"], row["columns"]
    captions, cells, width = len(row["captions"]), row["flow_cells"] or 0, row["text_width"] or 0
    return {
        "flow": (2, frames, rows * cells, columns * cells, 2),  # forward and backward; x, y
        "motion": (frames, rows, columns, 3),  # magnitude, x, y
        "similarity": (captions, frames, rows, columns),
        "text": (captions, width),
    }
