"""Does a shard hold what its index says? Every byte is read."""

import hashlib
import io
import os
from pathlib import Path
from typing import Any

import numpy as np

from stm.shards.schema import SHARD_SCHEMA, array_shapes, list_members
from stm.storage.files import sha256_file
from stm.storage.tables import read_receipt, read_table
from stm.storage.tars import read_member

_SHOWN = 20  # problems in an error message
_READ = [
    name for name in SHARD_SCHEMA.names if name != "questions"
]  # which say nothing about bytes; older shards lack them


class ShardError(ValueError):
    """A shard that is not what its index says; the message has a line for each thing that is wrong."""


def verify_shard(tar: Path, index: Path) -> int:
    """Checks every byte of a shard against its index, and returns how many members it has.

    Raises:
        ShardError: something differs.
    """
    problems = find_problems(tar, index)
    if problems:
        shown = "\n".join(f"  {problem}" for problem in problems[:_SHOWN])
        more = f"\n  and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise ShardError(f"the shard is damaged; remove the tar and its index and run again:\n{shown}{more}")
    return sum(len(hashes) for hashes in read_table(index, ["sha256"]).column("sha256").to_pylist())


def find_problems(tar: Path, index: Path) -> list[str]:
    """Compares a shard with its index.

    Returns:
        What is wrong, a line each, for people; empty when all is well.
    """
    if not tar.is_file():
        return [f"{tar}: does not exist"]
    try:
        rows, receipt = read_table(index, _READ).to_pylist(), read_receipt(index)
    except ValueError as error:
        return [str(error)]
    problems = []
    if sha256_file(tar) != receipt.get("tar_sha256"):
        problems.append(f"{tar}: its SHA-256 is not the one in the receipt of {index}")
    if receipt.get("clips") != len(rows):
        problems.append(f"{index}: has {len(rows)} clips, its receipt says {receipt.get('clips')}")
    size, descriptor = tar.stat().st_size, os.open(tar, os.O_RDONLY)
    try:
        for row in rows:
            problems += [f"{tar}: {problem}" for problem in _check_clip(descriptor, size, row)]
    finally:
        os.close(descriptor)
    return problems


def _check_clip(descriptor: int, tar_size: int, row: dict[str, Any]) -> list[str]:
    try:
        places = list_members(row)
    except ValueError:
        return [f"clip {row['video_id']!r} has {len(row['offsets'])} offsets and {len(row['sizes'])} sizes of JPEGs"]
    if len(places) != len(row["sha256"]):
        return [f"clip {row['video_id']!r} has {len(places)} members and {len(row['sha256'])} hashes"]
    problems, shapes = [], array_shapes(row)
    for (name, offset, size), expected in zip(places, row["sha256"], strict=True):
        if size is None or min(offset, size) < 0 or offset + size > tar_size:
            problems.append(f"{name} lies outside the tar: torn file?")
            continue
        data = read_member(descriptor, offset, size)
        if hashlib.sha256(data).hexdigest() != expected:
            problems.append(f"{name} has been changed or damaged")
        elif name.endswith(".npy"):
            problems += [f"{name} {problem}" for problem in _check_array(data, shapes[name.split(".")[1]])]
    return problems


def _check_array(data: bytes, shape: tuple[int, ...]) -> list[str]:
    """Whether an array is what the index lets a reader expect."""
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except ValueError as error:
        return [f"is no array: {error}"]
    if array.dtype != np.float16 or array.shape != shape:
        return [f"is {array.dtype} {list(array.shape)} where the index says float16 {list(shape)}"]
    return [] if np.isfinite(array).all() else ["has values that are not finite"]
