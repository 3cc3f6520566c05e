"""The shards stage: a shard's frames, captions and maps in one WebDataset tar, with an index of every byte.

A sample is `{key}.json`, `{key}.0000.jpg`, ..., `{key}.similarity.npy`, `{key}.motion.npy`. The tar holds nothing that
is not a function of its inputs: no times, no owners, sorted keys.
"""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from stm.config import BadInput, Pack
from stm.files import Member, TarWriter, atomic_path, make_receipt, sha256_file, write_table
from stm.manifest import Policy, Status, check_failures, make_key, read_rows
from stm.preprocess.captions import hash_frames
from stm.preprocess.frames_table import read_jpegs, read_kept
from stm.preprocess.grid import map_shape
from stm.preprocess.shard_check import ShardError, verify_shard
from stm.preprocess.shard_parts import ClipParts, join_parts
from stm.progress import Progress

__all__ = ["SHARD_SCHEMA", "ShardError", "pack_shard", "verify_shard"]

SHARD_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("video_id", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("label", pa.string()),
        pa.field("captions", pa.list_(pa.string()), nullable=False),
        pa.field("frames", pa.int32(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),  # pixels
        pa.field("height", pa.int32(), nullable=False),
        pa.field("rows", pa.int32(), nullable=False),  # of the maps
        pa.field("columns", pa.int32(), nullable=False),
        pa.field("pts", pa.list_(pa.float64()), nullable=False),  # seconds
        pa.field("json_offset", pa.int64(), nullable=False),  # bytes from the start of the tar
        pa.field("json_size", pa.int64(), nullable=False),
        pa.field("offsets", pa.list_(pa.int64()), nullable=False),  # of the JPEGs
        pa.field("sizes", pa.list_(pa.int32()), nullable=False),
        pa.field("similarity_offset", pa.int64()),  # null: not packed
        pa.field("similarity_size", pa.int64()),
        pa.field("motion_offset", pa.int64()),
        pa.field("motion_size", pa.int64()),
        pa.field("sha256", pa.list_(pa.string()), nullable=False),  # of the clip's members, in the order of the tar
    ]
)


Row = Mapping[str, Any]


def pack_shard(
    slice_path: Path,
    frames_tar: Path,
    frames_index: Path,
    captions: Path | None,
    similarity: Path | None,
    motion: Path | None,
    tar: Path,
    index: Path,
    pack: Pack,
    grid: int,
    bad_input: BadInput,
) -> None:
    """Packs the kept clips of a shard; one clip is in memory at a time.

    A clip that the captions, similarity or motion stage gave a status whose policy is `drop` is left out, when that
    part is packed. With `keep` it stays, without the part.

    Args:
        captions: needed when `pack.captions` names a source; similarity likewise when `pack.similarity` is set beside
            it, motion when `pack.motion` is set. Files of parts that are not packed are not read.

    Raises:
        TooManyFailures: more clips are left out than the config allows.
        ValueError: the inputs do not belong together, or are damaged.
    """
    kept = read_kept(frames_index)
    clips = {row["key"]: row for row in read_rows(slice_path)}
    parts = join_parts(kept, captions, similarity, motion, pack, grid, bad_input)
    lines: list[dict[str, Any]] = []
    outcomes: list[tuple[str, Status, Policy, str]] = []
    with atomic_path(tar) as temporary:
        with TarWriter(temporary) as writer, Progress(f"shards {tar.stem}", len(kept), "clips") as progress:
            for row, part in zip(kept, parts, strict=True):
                outcomes.append((row["video_id"], *part.outcome))
                if part.outcome.policy != "drop":
                    lines.append(_pack_clip(writer, clips[row["key"]], row, part, frames_tar, pack.captions, grid))
                progress.advance()
        digest = sha256_file(temporary)
    receipt = make_receipt("shards", pack, ("numpy", "pyarrow"), grid=grid, frames=hash_frames(kept))
    receipt |= {"policy": bad_input.model_dump(mode="json")["policy"], "tar_sha256": digest, "clips": len(lines)}
    write_table(index, pa.Table.from_pylist(lines, schema=SHARD_SCHEMA), receipt)
    check_failures(f"shards {tar.stem}", outcomes, bad_input.max_failure_rate)


def _pack_clip(
    writer: TarWriter, clip: Row, row: Row, part: ClipParts, frames_tar: Path, source: str | None, grid: int
) -> dict[str, Any]:
    """Adds one clip's members to the tar and returns its line of the index."""
    key = row["key"]
    if make_key(key) != key:  # keys become file names when someone unpacks the tar
        raise ValueError(f"{frames_tar}: {key!r} is no key of a clip; the frames index is damaged")
    rows, columns = map_shape(row["width"], row["height"], grid)
    shown = {
        "key": key,
        "video_id": row["video_id"],
        "split": clip["split"],
        "label": clip["label"],
        "captions": part.captions,
        "width": row["width"],
        "height": row["height"],
        "rows": rows,
        "columns": columns,
        "pts": row["pts"],
    }
    extra = {"questions": clip["questions"] or [], "caption_source": source}
    header = writer.add(f"{key}.json", json.dumps(shown | extra, sort_keys=True, allow_nan=False).encode())
    jpegs = [
        _copy_frame(writer, row, number, data, frames_tar)
        for number, data in enumerate(read_jpegs(frames_tar, dict(row)))
    ]
    maps = [
        None if array is None else writer.add(f"{key}.{name}.npy", _npy_bytes(array))
        for name, array in (("similarity", part.similarity), ("motion", part.motion))
    ]
    return shown | _places(header, jpegs, maps)


def _copy_frame(writer: TarWriter, row: Row, number: int, data: bytes, frames_tar: Path) -> Member:
    member = writer.add(f"{row['key']}.{number:04d}.jpg", data)
    if member.sha256 != row["sha256"][number]:
        raise ValueError(
            f"{frames_tar}: stored frame {number} of clip {row['video_id']!r} is not what its index says; the file is "
            "damaged. Remove the tar and its index and run again"
        )
    return member


def _npy_bytes(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()


def _places(header: Member, jpegs: list[Member], maps: list[Member | None]) -> dict[str, Any]:
    similarity, motion = maps
    members = [header, *jpegs, *(member for member in maps if member is not None)]
    return {
        "frames": len(jpegs),
        "json_offset": header.offset,
        "json_size": header.size,
        "offsets": [member.offset for member in jpegs],
        "sizes": [member.size for member in jpegs],
        "similarity_offset": similarity.offset if similarity else None,
        "similarity_size": similarity.size if similarity else None,
        "motion_offset": motion.offset if motion else None,
        "motion_size": motion.size if motion else None,
        "sha256": [member.sha256 for member in members],
    }
