"""Does a shard hold what its index says? Every byte is read."""

import hashlib
import os
from pathlib import Path
from typing import Any

from stm.files import read_member, read_receipt, read_table, sha256_file

_SHOWN = 20  # problems in an error message


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
        rows, receipt = read_table(index).to_pylist(), read_receipt(index)
    except ValueError as error:
        return [str(error)]
    problems = []
    if sha256_file(tar) != receipt.get("tar_sha256"):
        problems.append(f"{tar}: its SHA-256 is not the one in the receipt of {index}")
    if receipt.get("clips") != len(rows):
        problems.append(f"{index}: has {len(rows)} clips, its receipt says {receipt.get('clips')}")
    descriptor = os.open(tar, os.O_RDONLY)
    try:
        for row in rows:
            problems += _check_clip(descriptor, row, tar)
    finally:
        os.close(descriptor)
    return problems


def _check_clip(descriptor: int, row: dict[str, Any], tar: Path) -> list[str]:
    places = list_members(row)
    if len(places) != len(row["sha256"]):
        return [f"{tar}: clip {row['video_id']!r} has {len(places)} members and {len(row['sha256'])} hashes"]
    problems = []
    for (name, offset, size), expected in zip(places, row["sha256"], strict=True):
        try:
            found = hashlib.sha256(read_member(descriptor, offset, size)).hexdigest()
        except ValueError as error:
            problems.append(f"{tar}: {name}: {error}")
            continue
        if found != expected:
            problems.append(f"{tar}: {name} has been changed or damaged")
    return problems


def list_members(row: dict[str, Any]) -> list[tuple[str, int, int]]:
    """(name, offset, size) of a clip's members, in the order of the tar, from its line of the index."""
    key = row["key"]
    jpegs = zip(row["offsets"], row["sizes"], strict=True)
    places = [(f"{key}.json", row["json_offset"], row["json_size"])]
    places += [(f"{key}.{number:04d}.jpg", offset, size) for number, (offset, size) in enumerate(jpegs)]
    for part in ("similarity", "motion"):
        if row[f"{part}_offset"] is not None:
            places.append((f"{key}.{part}.npy", row[f"{part}_offset"], row[f"{part}_size"]))
    return places
