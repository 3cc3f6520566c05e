"""A lock on a folder, so that two processes do not write the same output at the same time."""

import errno
import fcntl
import os
import shutil
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, ClassVar, Self
from weakref import WeakValueDictionary

# Raised by file systems without locks, such as Lustre mounted without the option `flock` or NFS without its lock service.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


@contextmanager
def only_job(output: Path) -> Iterator[None]:
    """Hold a lock on `output` during the block; for stages without a journal.

    Raises:
        JobRunningError: another process is writing the same output.
    """
    lock = FolderLock.acquire(output.with_name(f".{output.name}.lock"), output)
    try:
        yield
    finally:
        lock.remove()


class JobRunningError(RuntimeError):
    """Another process is writing the same output; the message names it."""


class FolderLock:
    """Holds `folder`/lock until it is released, garbage-collected, or its process ends.

    The kernel holds the lock, so a process that was killed, on this or another machine, leaves none. On NFS the server
    holds it: if a whole machine fails, until the server gives it up (NFSv4: about 90 seconds). In the same process,
    locking again returns the same lock, so that a failed job can be repeated there.
    """

    _held: ClassVar["WeakValueDictionary[Path, FolderLock]"] = WeakValueDictionary()

    def __init__(self, path: Path, file: IO[str]) -> None:
        self.path = path
        self._file = file

    @classmethod
    def acquire(cls, folder: Path, output: Path) -> Self:
        """Create `folder` and lock it.

        Args:
            output: the file that the lock protects, for the message.

        Raises:
            JobRunningError: another process holds the lock.
        """
        path = folder.absolute() / "lock"
        held = cls._held.get(path)
        if held is not None and held._is_current():
            return held  # type: ignore[return-value]
        while True:
            folder.mkdir(parents=True, exist_ok=True)
            try:
                lock = cls(path, path.open("a+", encoding="utf-8"))
            except FileNotFoundError:  # its last owner has just removed the folder
                continue
            lock._lock(output)
            if lock._is_current():
                break
            lock._file.close()
        with suppress(OSError):  # only for the message; on a full disk, the job itself says what it could not write
            os.ftruncate(lock._file.fileno(), 0)
            os.write(lock._file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
        cls._held[path] = lock
        return lock

    def remove(self) -> None:
        """Delete the folder with all that is in it, and release the lock."""
        shutil.rmtree(self.path.parent, ignore_errors=True)
        self._file.close()
        # A network file system keeps deleted files in their folder while they are open, as the lock was.
        with suppress(OSError):
            self.path.parent.rmdir()

    def _lock(self, output: Path) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            owner = self._file.read() or "another process"
            raise JobRunningError(
                f"{output}: {owner} is writing it; wait until that has finished, or end it, and run again"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            warnings.warn(
                f"{self.path}: this file system has no locks ({error.strerror}); start no second job for {output}",
                stacklevel=4,
            )

    def _is_current(self) -> bool:
        """Whether the locked file is the one that others would lock: its last owner removes it."""
        if self._file.closed:
            return False
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), self.path.stat())
        except FileNotFoundError:
            return False
