"""Journals: the finished items of an unfinished job, from which a restarted job resumes."""

import hashlib
import struct
import time
from collections.abc import Mapping
from functools import cache
from os import getpid
from pathlib import Path
from typing import Any, BinaryIO

from stm.jobs.lock import FolderLock
from stm.storage.files import name_file_in_disk_errors
from stm.storage.receipts import hash_receipt

# A record is this header, the item's name (UTF-8) and its bytes. The header holds a mark, the lengths of the name and the
# bytes, and the SHA-256 of both.
_HEADER = struct.Struct("<4sIQ32s")
_MARK = b"item"


class Journal:
    """The finished items of an unfinished job, stored next to its output.

    Snakemake deletes the declared outputs of a failed or killed job. Finished items are therefore stored in an undeclared
    folder and reused when the job is restarted with the same receipt. Items of other receipts stay beside them, so that a
    setting that is changed and changed back loses no work; all are deleted once the output is complete.

    Each process appends records to a file of its own: there are as many files as processes, whatever the number of items,
    and nothing is ever written after a record that a killed process left incomplete. A file is read up to such a record.
    Nothing is flushed to the disk: an item lost in a power cut is missing or fails its checksum, and is processed again.

    Only one job at a time can use a journal. A journal that is passed to a worker process can only store items there.

    >>> journal = Journal(Path("frames/train-00000.tar"), receipt)   # doctest: +SKIP
    >>> journal.get("clip-1")                                        # doctest: +SKIP

    Raises:
        JobRunningError: another process is writing the same output.
    """

    def __init__(self, output: Path, receipt: Mapping[str, Any]) -> None:
        self.folder = output.with_name(f".{output.name}.journal")
        self._writer = _Writer(self.folder, hash_receipt(receipt)[:16])
        self._lock = FolderLock.acquire(self.folder, output)
        self._parts: dict[Path, _Part] = {}
        self._reading: BinaryIO | None = None
        self.refresh()

    def __reduce__(self) -> tuple[Any, ...]:
        return _writer_of_process, (self.folder, self._writer.receipt)

    def refresh(self) -> None:
        """Find the items that this process and its workers have stored since the last call."""
        for path in self.folder.glob(f"{self._writer.receipt}.*"):
            self._parts.setdefault(path, _Part(path)).scan()

    def get(self, item: str) -> bytes | None:
        """Return the bytes stored for `item`; None if the item is not finished."""
        for part in reversed(self._parts.values()):
            offset = part.offsets.get(_digest(item.encode()))
            if offset is not None:
                data = _read(self._open(part.path), offset, item)
                if data is not None:
                    return data
        return None

    def put(self, item: str, data: bytes) -> None:
        """Store the bytes of a finished item."""
        path, offset = self._writer.put(item, data)
        self._parts.setdefault(path, _Part(path)).offsets[_digest(item.encode())] = offset

    def close(self) -> None:
        """Delete the journal, including the items of other receipts; call this once the output is complete."""
        self._writer.close()
        self._close_reader()
        self._parts.clear()
        self._lock.remove()

    def _open(self, path: Path) -> BinaryIO:
        # Opening a file for each item would be slow, and keeping all open too many: each killed worker has left one.
        if self._reading is None or self._reading.name != str(path):
            self._close_reader()
            self._reading = path.open("rb")
        return self._reading

    def _close_reader(self) -> None:
        if self._reading is not None:
            self._reading.close()
            self._reading = None


class _Writer:
    """Appends records to a file that belongs to this process."""

    def __init__(self, folder: Path, receipt: str) -> None:
        self.receipt = receipt  # names the file, so that a worker that outlives its job cannot write to another journal
        self._folder = folder
        self._file: BinaryIO | None = None

    def put(self, item: str, data: bytes) -> tuple[Path, int]:
        """Append a record; return its file and offset."""
        name = item.encode()
        checksum = hashlib.sha256(name)
        checksum.update(data)
        record = memoryview(b"".join([_HEADER.pack(_MARK, len(name), len(data), checksum.digest()), name, data]))
        if self._file is None:
            path = self._folder / f"{self.receipt}.{getpid()}.{time.time_ns()}"
            self._file = path.open("xb", buffering=0)
        path, offset = Path(self._file.name), self._file.tell()
        try:
            with name_file_in_disk_errors(path):
                while record:  # a disk that fills up accepts only a part
                    record = record[self._file.write(record) :]
        except BaseException:
            self.close()  # nothing may follow an incomplete record
            raise
        return path, offset

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


@cache
def _writer_of_process(folder: Path, receipt: str) -> _Writer:
    # A journal arrives with each task, but a process has only one file.
    return _Writer(folder, receipt)


class _Part:
    """One file of a journal, and where its complete records begin."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offsets: dict[bytes, int] = {}  # in bytes, by the digest of the item
        self._end = 0  # of the records found so far

    def scan(self) -> None:
        """Find the records that were appended since the last scan."""
        size = self.path.stat().st_size
        if self._end + _HEADER.size > size:
            return
        with self.path.open("rb") as file:
            while self._end + _HEADER.size <= size:
                file.seek(self._end)
                mark, name_length, length, _ = _HEADER.unpack(file.read(_HEADER.size))
                after = self._end + _HEADER.size + name_length + length
                if mark != _MARK or after > size:
                    return
                self.offsets[_digest(file.read(name_length))] = self._end
                self._end = after


def _digest(name: bytes) -> bytes:
    # Names take hundreds of bytes each, and there may be millions.
    return hashlib.sha256(name).digest()[:16]


def _read(file: BinaryIO, offset: int, item: str) -> bytes | None:
    """Return the bytes of the record at `offset`; None if it is damaged or is not that of `item`."""
    file.seek(offset)
    _, name_length, length, checksum = _HEADER.unpack(file.read(_HEADER.size))
    stored = file.read(name_length + length)
    name = item.encode()
    if stored[:name_length] != name or hashlib.sha256(stored).digest() != checksum:
        return None
    return stored[name_length:]
