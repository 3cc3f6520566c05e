"""How results reach the disk: atomically, byte for byte the same from the same inputs, and with a receipt.

Every stage writes through this module. A receipt is a small JSON object that says what made a file: the stage, the
part of the config that it used, the models' hashes and the versions of the libraries. It holds no time and no path of
the machine, so that two runs of the same work give the same bytes.
"""

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

_TEMPORARY = re.compile(r"\.(.+)\.(\d+)\.tmp")

DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS})
"""Error numbers that only writing can give: the disk, the quota or the largest file is full, or nothing may be written."""


class UnsafePathError(ValueError):
    """A path from a manifest or an archive that would leave the folder it belongs to."""


def safe_join(root: Path, relative: str) -> Path:
    """`root / relative`, refused when it is absolute or leaves `root`, links resolved.

    Raises:
        UnsafePathError: the path leaves `root`.
    """
    path = Path(relative)
    if path.is_absolute() or "\x00" in relative:
        raise UnsafePathError(f"{relative!r}: paths must be relative to {root}")
    resolved, base = (root / path).resolve(), root.resolve()
    if not resolved.is_relative_to(base):
        raise UnsafePathError(f"{relative!r} leaves its root {root}")
    return root / path


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path in the folder of `path`; renamed to it when the block ends well, removed when it does not.

    What processes that were killed have left of earlier attempts at the same file is removed too.

    Raises:
        OSError: the disk is full, for instance; the message says which file was being written. What was at `path`
            before is still there.
    """
    with name_file_of_full_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Only those of this file: another machine's processes may be writing others into the folder.
        for leftover in _leftovers(path.parent.absolute()).pop(path.name, ()):
            leftover.unlink(missing_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            with suppress(FileNotFoundError):
                temporary.unlink()


@contextmanager
def name_file_of_full_disk(path: Path) -> Iterator[None]:
    """Says of a full disk which file was being written: the system's own error does not."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS or error.filename is not None:
            raise
        what = f"{os.strerror(error.errno)}; what was finished before is kept: make room and run again; while writing"
        raise OSError(error.errno, what, str(path)) from error


@cache
def _leftovers(folder: Path) -> dict[str, list[Path]]:
    """Temporary files whose process is gone, by the file that they were for. Asked once a folder: some are large."""
    found: dict[str, list[Path]] = {}
    for path in folder.iterdir():
        match = _TEMPORARY.fullmatch(path.name)
        if match and not Path("/proc", match[2]).exists():
            found.setdefault(match[1], []).append(path)
    return found


def write_bytes(path: Path, data: bytes) -> None:
    """Writes `data` to `path` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as sorted, indented JSON, atomically."""
    write_bytes(path, (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
