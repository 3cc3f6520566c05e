"""Verifies every byte of a shard against its index."""

import hashlib
import io
import os
from pathlib import Path
from typing import Any

import numpy as np

from stm.shards.checksums import array_checksums, checksum
from stm.shards.schema import ARRAYS, PackedArray, checksum_columns, clip_sizes, list_members, shard_schema
from stm.storage.files import sha256_file
from stm.storage.tables import check_schema, read_receipt, read_table
from stm.storage.tars import read_member

_SHOWN = 20  # problems listed in an error message


class ShardError(ValueError):
    """Raised for a shard that does not match its index; the message has one line per problem."""


def verify_shard(tar: Path, index: Path) -> int:
    """Verify a shard and return its number of members.

    Raises:
        ShardError: the shard does not match its index.
    """
    problems = find_problems(tar, index)
    if problems:
        shown = "\n".join(f"  {problem}" for problem in problems[:_SHOWN])
        more = f"\n  and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise ShardError(f"the shard is damaged; remove the tar and its index and run again:\n{shown}{more}")
    return sum(len(hashes) for hashes in read_table(index, ["sha256"]).column("sha256").to_pylist())


def find_problems(tar: Path, index: Path) -> list[str]:
    """Compare a shard with its index.

    Returns:
        One human-readable line per problem; empty for an intact shard.
    """
    if not tar.is_file():
        return [f"{tar}: does not exist"]
    try:
        rows = _read_rows(index)
        receipt = read_receipt(index)
    except ValueError as error:
        return [str(error)]
    problems = []
    if sha256_file(tar) != receipt.get("tar_sha256"):
        problems.append(f"{tar}: its SHA-256 differs from the one in the receipt of {index}")
    if receipt.get("clips") != len(rows):
        problems.append(f"{index}: has {len(rows)} clips, its receipt says {receipt.get('clips')}")
    size = tar.stat().st_size
    descriptor = os.open(tar, os.O_RDONLY)
    try:
        for row in rows:
            problems += [f"{tar}: {problem}" for problem in _check_clip(descriptor, size, row)]
    finally:
        os.close(descriptor)
    return problems


def _read_rows(index: Path) -> list[dict[str, Any]]:
    """The rows of an index, which may be of a version that wrote no checksums.

    Raises:
        DamagedError: the table is damaged, or lacks other columns.
    """
    table = read_table(index)
    # The tar's contents do not depend on questions, and older shards lack the column.
    optional = {"questions", *(() if "crc32" in table.schema.names else ("crc32", *checksum_columns()))}
    columns = [name for name in shard_schema().names if name not in optional]
    check_schema(index, table.schema, shard_schema(), columns)
    return table.select(columns).to_pylist()


def _check_clip(descriptor: int, tar_size: int, row: dict[str, Any]) -> list[str]:
    try:
        members = list_members(row)
    except ValueError:
        return [f"clip {row['video_id']!r} has {len(row['offsets'])} offsets and {len(row['sizes'])} sizes of JPEGs"]
    if len(members) != len(row["sha256"]):
        return [f"clip {row['video_id']!r} has {len(members)} members and {len(row['sha256'])} hashes"]
    problems = []
    for (name, offset, size), expected in zip(members, row["sha256"], strict=True):
        if size is None or min(offset, size) < 0 or offset + size > tar_size:
            problems.append(f"{name} lies outside the tar: is it truncated?")
            continue
        data = read_member(descriptor, offset, size)
        if hashlib.sha256(data).hexdigest() != expected:
            problems.append(f"{name} has been changed or damaged")
        else:
            problems += [f"{name} {problem}" for problem in _check_member(name, data, row)]
    return problems


def _check_member(name: str, data: bytes, row: dict[str, Any]) -> list[str]:
    """What is wrong with a member that has its SHA-256: the shape of an array, or the checksums that readers rely on."""
    if name.endswith(".json"):
        return []
    part = name.split(".")[1]
    if name.endswith(".npy"):
        array = ARRAYS[part]
        shape = array.shape(clip_sizes(row))
        if problems := _check_array(data, array, shape):
            return problems
        found, expected = array_checksums(data, array, shape), row.get(array.checksum_column)
    else:
        found, expected = [checksum(data)], row.get("crc32", [])[int(part) :][:1]
    return ["has other checksums in its index"] if "crc32" in row and found != expected else []


def _check_array(data: bytes, declared: PackedArray, shape: tuple[int, ...]) -> list[str]:
    """The differences between an array's file and its description in the index."""
    try:
        values = np.load(io.BytesIO(data), allow_pickle=False)
    except ValueError as error:
        return [f"is not a .npy file: {error}"]
    if values.dtype != declared.dtype or values.shape != shape:
        return [f"is {values.dtype} {list(values.shape)} where the index says {declared.dtype} {list(shape)}"]
    return [] if np.isfinite(values).all() else ["has values that are not finite"]
