"""Uncompressed tars whose bytes depend on their members alone, and reading one member in place."""

import errno
import hashlib
import io
import os
import tarfile
from pathlib import Path
from typing import NamedTuple

from stm.storage.tables import DamagedError


class Member(NamedTuple):
    """Where one file lies inside a tar."""

    name: str
    offset: int  # bytes from the start of the tar to the file's first byte
    size: int  # bytes
    sha256: str


class TarWriter:
    """An uncompressed tar whose bytes depend on its members alone: no times, no owners, no order but yours."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115

    def add(self, name: str, data: bytes, sha256: str | None = None) -> Member:
        """Adds a member; `sha256` is that of the data, where it is known already."""
        info = tarfile.TarInfo(name)
        info.size, info.mode = len(data), 0o644
        self._tar.addfile(info, io.BytesIO(data))
        vars(self._tar)["members"].clear()  # a list for reading only, which would grow with the shard
        padded = -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        return Member(name, self._tar.offset - padded, len(data), sha256 or hashlib.sha256(data).hexdigest())

    def __enter__(self) -> "TarWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        try:
            if kind is None:  # a tar that is given up needs no end, and on a full disk there is no room for one
                self._tar.close()
        finally:
            self._file.close()


def read_member(tar: int, offset: int, size: int) -> bytes:
    """Reads `size` bytes at `offset` of an open file descriptor; several threads may share the descriptor.

    Raises:
        DamagedError: the file has no such bytes.
        OSError: the disk or the network has failed.
    """
    try:
        data = os.pread(tar, size, offset)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EISDIR):  # a place that no file has; a folder in the tar's place
            raise DamagedError(f"it has no {size} bytes at {offset}: {error.strerror}") from error
        raise
    if len(data) != size:
        raise DamagedError(
            f"the tar ends {size - len(data)} bytes before the end of the member at {offset}: torn file?"
        )
    return data
