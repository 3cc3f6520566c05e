"""Outputs of the frames stage (the tar of JPEGs and its index), and functions for later stages to read them."""

import hashlib
import json
import math
import os
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import simplejpeg
from numpy.typing import NDArray

from stm.config import BadInput
from stm.jobs.journal import Journal
from stm.jobs.status import Policy, Status
from stm.jobs.workers import Failure
from stm.manifest import check_keys, read_slice
from stm.preprocess.clip_outcomes import Record, as_columns, decide, name_item, read_record
from stm.storage.files import atomic_path, sha256_file
from stm.storage.machine_errors import name_file
from stm.storage.tables import LONGEST_SIDE, DamagedError, read_table, write_table
from stm.storage.tars import TarWriter, read_member

FRAMES_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("video_id", pa.string(), nullable=False),
        pa.field("path", pa.string(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("policy", pa.string(), nullable=False),
        pa.field("detail", pa.string(), nullable=False),
        pa.field("kept", pa.bool_(), nullable=False),
        pa.field("frames", pa.int32(), nullable=False),  # stored frames; 0 if not kept
        pa.field("width", pa.int32()),  # pixels of the stored frames; null if nothing was decoded
        pa.field("height", pa.int32()),
        pa.field("source_width", pa.int32()),  # pixels as displayed: cropped, square, rotated
        pa.field("source_height", pa.int32()),
        pa.field("pts", pa.list_(pa.float64()), nullable=False),  # s since the start of the file
        pa.field("decode_index", pa.list_(pa.int32()), nullable=False),  # 0 for the clip's first decoded frame
        pa.field("offsets", pa.list_(pa.int64()), nullable=False),  # bytes from the start of the tar
        pa.field("sizes", pa.list_(pa.int32()), nullable=False),  # bytes
        pa.field("sha256", pa.list_(pa.string()), nullable=False),  # of the JPEGs
    ]
)
_LISTS = ("pts", "decode_index", "offsets", "sizes", "sha256")
FRAME_SIZES = ("width", "height", "source_width", "source_height")


def write_frames(
    rows: Sequence[Mapping[str, Any]],
    journal: Journal,
    failures: Mapping[str, Failure],
    tar: Path,
    index: Path,
    receipt: Mapping[str, Any],
    bad_input: BadInput,
) -> list[tuple[str, Status, Policy, str]]:
    """Write the tar and the index from the journal, with one clip in memory at a time.

    Args:
        rows: all clips of the slice.
        failures: failures of clips without a journal record, by journal item.

    Returns:
        (video id, status, policy, detail) per clip.
    """
    # Sort by key, so that later stages can stream several tables in lockstep without loading them.
    with atomic_path(tar) as temporary, TarWriter(temporary) as writer:
        table = [
            _write_clip(writer, row, read_record(journal, name_item(row), failures), bad_input)
            for row in sorted(rows, key=lambda r: str(r["key"]))
        ]
    receipt = {**receipt, "tar_sha256": sha256_file(tar)}
    write_table(index, pa.Table.from_pylist(table, schema=FRAMES_SCHEMA), receipt)
    return [(row["video_id"], Status(row["status"]), row["policy"], row["detail"]) for row in table]


def _write_clip(writer: TarWriter, row: Mapping[str, Any], record: Record, bad_input: BadInput) -> dict[str, Any]:
    """Add a clip to the tar if it is kept, and return its row of the index."""
    header = record.header
    outcome = decide(record.notes, bad_input, usable=bool(record.blobs))
    identity = {name: row[name] for name in ("key", "video_id", "path")}
    sizes = {name: header.get(name) for name in FRAME_SIZES}
    times = {name: header[name] if outcome.kept else [] for name in ("pts", "decode_index")}
    members = []
    if outcome.kept:
        metadata = {"key": row["key"], "video_id": row["video_id"], **sizes, **times}
        writer.add(f"{row['key']}.json", json.dumps(metadata, sort_keys=True).encode())
        members = [writer.add(f"{row['key']}.{n:04d}.jpg", jpeg) for n, jpeg in enumerate(record.blobs)]
    return {
        **identity,
        **as_columns(outcome),
        "kept": outcome.kept,
        "frames": len(members),
        **sizes,
        **times,
        "offsets": [member.offset for member in members],
        "sizes": [member.size for member in members],
        "sha256": [member.sha256 for member in members],
    }


def read_kept(index: Path, only: Collection[str] | None = None) -> list[dict[str, Any]]:
    """Read the rows of the clips that the frames stage kept, sorted by key.

    Args:
        only: keys of the clips to read; None for all of them.

    Raises:
        DamagedError: the index is missing, truncated or inconsistent.
    """
    table = read_table(index, schema=FRAMES_SCHEMA)
    if only is not None:
        table = table.filter(pc.is_in(table["key"], pa.array(only, pa.string())))
    rows: list[dict[str, Any]] = table.to_pylist()
    keys = [row["key"] for row in rows]
    check_keys(index, keys)
    if keys != sorted(keys):
        raise DamagedError(f"{index}: its rows are not sorted by key; remove it and its tar and run again")
    for number, row in enumerate(rows):
        problem = _find_problem(row) if row["kept"] else None
        if problem:
            raise DamagedError(
                f"{index}: row {number}, clip {row['video_id']!r:.100}: {problem}; remove it and its tar and run again"
            )
    return [row for row in rows if row["kept"]]


def _find_problem(row: Mapping[str, Any]) -> str | None:
    """Return the first inconsistency in a kept clip's row, phrased to follow the clip's name, or None."""
    if row["frames"] < 1:
        return f"is kept with {row['frames']} frames"
    for name in _LISTS:
        if len(row[name]) != row["frames"]:
            return f"has {len(row[name])} values of `{name}` for {row['frames']} frames"
    for name in ("width", "height"):
        if not 1 <= (row[name] or 0) <= LONGEST_SIDE:
            return f"has a {name} of {row[name]} pixels"
    if min(row["offsets"]) < 0 or min(row["sizes"]) < 1 or min(row["decode_index"]) < 0:
        return "has negative offsets, sizes or decode indices"
    if any(first >= second for first, second in pairwise(row["decode_index"])):
        return "has frames that are not in order"
    return None if all(map(math.isfinite, row["pts"])) else "has timestamps that are not finite"


def rows_of_kept(slice_path: Path, kept: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the slice's rows for the kept clips, in the order of `kept`.

    Raises:
        DamagedError: the slice is truncated, or lacks a kept clip because the frames come from a different slice.
    """
    rows = {row["key"]: row for row in read_slice(slice_path)}
    for row in kept:
        if row["key"] not in rows:
            raise DamagedError(
                f"{slice_path}: has no clip {row['key']!r}, which the frames stage kept: its frames were made from "
                f"another slice. Remove {slice_path.stem}.tar and {slice_path.stem}.parquet from `frames` and run again"
            )
    return [rows[row["key"]] for row in kept]


def are_removed(tar: Path) -> bool:
    """Whether the frames of a shard were removed after packing."""
    return not tar.exists() or tar.stat().st_size == 0


def read_jpegs(tar: Path, row: Mapping[str, Any], which: Sequence[int] | None = None) -> list[bytes]:
    """Read the JPEGs of a clip's stored frames.

    Args:
        row: the clip's row of the index.
        which: indices of the stored frames; None for all frames.

    Raises:
        DamagedError: the tar is missing, or its bytes do not match the checksums of the index.
        OSError: the disk or the network fails.
    """
    numbers = range(row["frames"]) if which is None else which
    try:
        file = os.open(tar, os.O_RDONLY)
        try:
            return [_read_jpeg(file, tar, row, number) for number in numbers]
        finally:
            os.close(file)
    except FileNotFoundError as error:
        raise DamagedError(f"{tar}: cannot be read ({error.strerror}); remove its index and run again") from error
    except OSError as error:
        raise name_file(error, tar) from error


def _read_jpeg(file: int, tar: Path, row: Mapping[str, Any], number: int) -> bytes:
    try:
        data = read_member(file, row["offsets"][number], row["sizes"][number])
        problem = "" if hashlib.sha256(data).hexdigest() == row["sha256"][number] else "is not what its index says"
    except DamagedError as error:
        problem = str(error)
    if problem and are_removed(tar):
        raise DamagedError(
            f"{tar}: the frames were removed once they were packed (frames.keep: false)",
            "the stages make them again when they need them; run this one with `snakemake` or `stm`",
        )
    if problem:
        raise DamagedError(
            f"{tar}: stored frame {number} of clip {row['video_id']!r}: {problem}; the file is damaged or of another "
            "run. Remove the tar and its index and run again"
        )
    return data


def read_frames(tar: Path, row: Mapping[str, Any], which: Sequence[int] | None = None) -> NDArray[np.uint8]:
    """Decode a clip's stored frames to RGB, uint8 [T, H, W, 3]; same arguments and errors as `read_jpegs`."""
    jpegs = read_jpegs(tar, row, which)
    frames = np.empty((len(jpegs), row["height"], row["width"], 3), np.uint8)
    for number, jpeg in enumerate(jpegs):
        simplejpeg.decode_jpeg(jpeg, "RGB", buffer=frames[number])
    return frames


def load_frame(
    frames_tar: Path, row: Mapping[str, Any], number: int, colours: Literal["RGB", "GRAY"] = "RGB"
) -> np.ndarray:
    """Decode one stored frame of a clip: uint8 [H, W, 3], RGB.

    Args:
        row: the clip's row of the frames index.
        colours: `GRAY` returns only the JPEG's luma channel, [H, W, 1].

    Raises:
        DamagedError: the tar is damaged or does not belong to the index. Since the frames stage encoded every frame, an
            error means that the file is damaged, not the clip.
    """
    place = f"{frames_tar}: clip {row['video_id']!r}, stored frame {number}"
    data = read_jpegs(frames_tar, row, [number])[0]
    try:
        frame = simplejpeg.decode_jpeg(data, colorspace=colours)
    except ValueError as error:
        raise DamagedError(
            f"{place}: not a readable JPEG ({error}). Remove the tar and its index and run again"
        ) from error
    if frame.shape[:2] != (row["height"], row["width"]):
        raise DamagedError(
            f"{place}: is {frame.shape[1]} x {frame.shape[0]} pixels, the index says {row['width']} x {row['height']}; "
            "tar and index do not belong together. Remove both and run again"
        )
    return frame
