"""Small shards in the format of the stage `shards`, written independently of it from the format's description."""

import io
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import simplejpeg
import torch

from stm.storage.tables import write_table
from stm.storage.tars import TarWriter

ARRAYS = ("flow", "motion", "similarity", "text")

# Columns added after version 0.1.
LATER = ("caption_sources", "flow_offset", "flow_size", "text_offset", "text_size", "flow_cells", "text_width")
CHECKSUMS = ("crc32", *(f"{name}_crc32" for name in ARRAYS))  # later still: before them, only whole members had hashes
COUNTING = {"flow": 2, "motion": 1, "similarity": 2, "text": 1}  # leading dimensions that count an array's layers

SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("video_id", pa.string()),
        ("split", pa.string()),
        ("label", pa.string()),
        ("captions", pa.list_(pa.string())),
        ("caption_sources", pa.list_(pa.string())),
        *((name, pa.int32()) for name in ("frames", "width", "height", "rows", "columns")),
        ("pts", pa.list_(pa.float64())),
        ("json_offset", pa.int64()),
        ("json_size", pa.int64()),
        ("offsets", pa.list_(pa.int64())),
        ("sizes", pa.list_(pa.int32())),
        *((name, pa.list_(pa.uint32())) for name in CHECKSUMS),
        *((f"{name}_{what}", pa.int64()) for name in ARRAYS for what in ("offset", "size")),
        ("flow_cells", pa.int32()),
        ("text_width", pa.int32()),
        ("sha256", pa.list_(pa.string())),
    ]
)


def make_frames(clip: int, frames: int, width: int, height: int) -> np.ndarray:
    """Smooth images, uint8 [frames, height, width, 3]: red encodes the frame's number, green and blue the position."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    video = np.empty((frames, height, width, 3))
    video[..., 0] = (10 + 5 * np.arange(frames))[:, None, None]
    video[..., 1] = 40 + 150 * x
    video[..., 2] = 40 + 150 * y + clip % 20
    return video.round().astype(np.uint8)


def make_clip(number: int = 0, **changes: Any) -> dict[str, Any]:
    """The content of a clip.

    By default `similarity` and `motion` are random, `flow` and `text` are None; each can be an array or None.
    """
    clip: dict[str, Any] = {"key": f"clip-{number:03d}", "label": "ab"[number % 2], "captions": ["one", "two", "three"]}
    clip |= {"frames": 12, "width": 80, "height": 64, "rows": 4, "columns": 5} | changes
    clip |= {name: clip.get(name) for name in ("flow", "text")}
    clip.setdefault("caption_sources", ["human"] * len(clip["captions"]))
    generator = np.random.default_rng(number)
    shape = (clip["frames"], clip["rows"], clip["columns"])
    if "similarity" not in clip:
        clip["similarity"] = generator.uniform(-1, 1, (len(clip["captions"]), *shape)).astype(np.float16)
    if "motion" not in clip:
        clip["motion"] = generator.uniform(0, 3, (*shape, 3)).astype(np.float16)
    if "video" not in clip:
        clip["video"] = make_frames(number, clip["frames"], clip["width"], clip["height"])
    return clip


def write_npy(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


def sum_parts(jpegs: Sequence[bytes], arrays: Mapping[str, np.ndarray]) -> dict[str, list[int]]:
    """The columns of checksums: of each JPEG, and of each array's header and of every 8 of its layers."""
    columns = {"crc32": [zlib.crc32(jpeg) for jpeg in jpegs]}
    for name, values in arrays.items():
        layers = values.reshape(-1, *values.shape[COUNTING[name] :])
        header = write_npy(values)[: -values.nbytes]
        groups = [layers[start : start + 8].tobytes() for start in range(0, len(layers), 8)]
        columns[f"{name}_crc32"] = [zlib.crc32(part) for part in (header, *groups)]
    return columns


def write_shard(index: Path, clips: list[dict[str, Any]], *, old: bool = False, checksums: bool = True) -> Path:
    """Write `index` and the tar beside it; return `index`.

    Args:
        old: omit the columns added after version 0.1.
        checksums: write the columns of checksums, which only shards of version 0.1 and its successors lack.
    """
    index.parent.mkdir(parents=True, exist_ok=True)
    with TarWriter(index.with_suffix(".tar")) as tar:
        rows = [_write_clip(tar, clip) for clip in sorted(clips, key=lambda clip: clip["key"])]
    table = pa.Table.from_pylist(rows, SCHEMA)
    without = [*(LATER if old else ()), *(() if checksums and not old else CHECKSUMS)]
    write_table(index, table.drop_columns(without), {"stage": "shards"})
    return index


def _write_clip(tar: TarWriter, clip: dict[str, Any]) -> dict[str, Any]:
    key = clip["key"]
    copied = ("key", "label", "captions", "caption_sources", "frames", "width", "height", "rows", "columns")
    row = {name: clip[name] for name in copied} | {"flow_cells": None, "text_width": None}
    if clip["flow"] is not None:
        row["flow_cells"] = clip["flow"].shape[2] // clip["rows"]
    if clip["text"] is not None:
        row["text_width"] = clip["text"].shape[1]
    row |= {"video_id": key, "split": "train", "pts": [0.25 * i for i in range(clip["frames"])]}
    description = tar.add(f"{key}.json", json.dumps({"key": key}).encode())
    encode = {"quality": 98, "colorspace": "RGB", "colorsubsampling": "444"}
    images = [np.ascontiguousarray(image) for image in clip["video"]]
    jpegs = [simplejpeg.encode_jpeg(image, **encode) for image in images]
    frames = [tar.add(f"{key}.{i:04d}.jpg", jpeg) for i, jpeg in enumerate(jpegs)]
    members = [description, *frames]
    for name in ARRAYS:
        row |= {f"{name}_offset": None, f"{name}_size": None}
        if clip[name] is not None:
            members.append(tar.add(f"{key}.{name}.npy", write_npy(clip[name])))
            row |= {f"{name}_offset": members[-1].offset, f"{name}_size": members[-1].size}
    row |= {"json_offset": description.offset, "json_size": description.size}
    row |= sum_parts(jpegs, {name: clip[name] for name in ARRAYS if clip[name] is not None})
    row |= {"offsets": [m.offset for m in frames], "sizes": [m.size for m in frames]}
    return row | {"sha256": [m.sha256 for m in members]}


def same(first: Any, second: Any) -> bool:
    """Whether two batches, or parts of them, are equal in every bit."""
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[name], second[name]) for name in first)
    return torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second
