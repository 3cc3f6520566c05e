"""Atomic, deterministic file writes: every stage writes its results through this module."""

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from stm.storage.machine_errors import is_machine_error, name_file

_TEMPORARY = re.compile(r"\.(.+)\.(\d+)\.tmp")

DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS})
"""Error codes (errno) that only a write can raise: disk full, quota exceeded, file too large, read-only file system."""


class UnsafePathError(ValueError):
    """A path from a manifest or an archive that would escape its root folder."""


def safe_join(root: Path, relative: str) -> Path:
    """Return `root / relative`, after checking with symbolic links resolved that it is inside `root`.

    Raises:
        UnsafePathError: the path is absolute or leaves `root`.
    """
    path = Path(relative)
    if path.is_absolute() or "\x00" in relative:
        raise UnsafePathError(f"{relative!r}: paths must be relative to {root}")
    if not (root / path).resolve().is_relative_to(root.resolve()):
        raise UnsafePathError(f"{relative!r} leaves its root {root}")
    # Not the resolved path, so that messages name the path as the user wrote it.
    return root / path


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to `path`; the file replaces `path` if the block succeeds and is removed if it fails.

    Temporary files left by killed processes that were writing the same file are removed, too.

    Raises:
        OSError: the write failed, for instance because the disk is full; the message names the file. An existing file at
            `path` is left unchanged.
    """
    with name_file_in_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Remove leftovers of this file only: processes on other machines may be writing other files to the folder.
        for leftover in _leftovers(path.parent.absolute()).pop(path.name, ()):
            leftover.unlink(missing_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            yield temporary
            # Without fsync, a power cut after the rename can leave an empty file under the final name.
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            with suppress(FileNotFoundError):
                temporary.unlink()


@contextmanager
def name_file_in_disk_errors(path: Path) -> Iterator[None]:
    """Add the path being written to the block's disk errors, which do not name a file themselves."""
    try:
        yield
    except OSError as error:
        full = error.errno in DISK_ERRORS
        if error.errno is None or error.filename is not None or not (full or is_machine_error(error)):
            raise
        remedy = "make room and run again" if full else "run again once it is mended"
        message = f"{os.strerror(error.errno)}; finished work is kept: {remedy}; while writing"
        raise OSError(error.errno, message, str(path)) from error


@cache
def _leftovers(folder: Path) -> dict[str, list[Path]]:
    """Return temporary files whose process has ended, by the name of their target file.

    Cached per folder, because listing a large folder for every write would be slow.
    """
    leftovers: dict[str, list[Path]] = {}
    for path in folder.iterdir():
        match = _TEMPORARY.fullmatch(path.name)
        if match and not Path("/proc", match[2]).exists():
            leftovers.setdefault(match[1], []).append(path)
    return leftovers


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, value: Any) -> None:
    """Write `value` atomically as indented JSON with sorted keys."""
    write_bytes(path, (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise name_file(error, path) from error
    return json.loads(text)


def sha256_file(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file's bytes."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise name_file(error, path) from error
