"""Writes deterministic uncompressed tars and reads their members at random."""

import errno
import hashlib
import io
import os
import tarfile
from pathlib import Path
from typing import NamedTuple

from stm.storage.tables import DamagedError


class Member(NamedTuple):
    """The location of one file inside a tar."""

    name: str
    offset: int  # bytes from the start of the tar to the file's first byte
    size: int  # bytes
    sha256: str


class TarWriter:
    """An uncompressed tar whose bytes depend only on its members and their order: no timestamps, no owners."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        # USTAR has no extension headers, so every tar reader understands it.
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115

    def add(self, name: str, data: bytes, sha256: str | None = None) -> Member:
        """Add a member and return its location; pass the data's `sha256` if it is already known."""
        info = tarfile.TarInfo(name)
        info.size = len(data)
        info.mode = 0o644
        self._tar.addfile(info, io.BytesIO(data))
        vars(self._tar)["members"].clear()  # needed only for reading; it would grow with the shard
        padded = -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        return Member(name, self._tar.offset - padded, len(data), sha256 or hashlib.sha256(data).hexdigest())

    def __enter__(self) -> "TarWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        try:
            # Not after an error: the end marker is then unnecessary, and on a full disk writing it would fail again.
            if kind is None:
                self._tar.close()
        finally:
            self._file.close()


def read_member(tar: int, offset: int, size: int) -> bytes:
    """Read `size` bytes at `offset` from an open file descriptor, which several threads may share.

    Raises:
        DamagedError: the range is outside the file.
        OSError: a disk or network error occurred.
    """
    try:
        data = os.pread(tar, size, offset)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EISDIR):  # impossible offset; a directory instead of a tar
            raise DamagedError(f"cannot read {size} bytes at offset {offset}: {error.strerror}") from error
        raise
    if len(data) != size:
        raise DamagedError(
            f"the tar ends {size - len(data)} bytes before the end of the member at offset {offset}: truncated file?"
        )
    return data
