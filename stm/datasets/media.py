"""Opening a media file with PyAV so that errors of the machine cannot be mistaken for properties of the file.

Many of ffmpeg's demuxers take a read error for the end of the file, and some report a file that was cut off as an
input/output error. Files are therefore read by Python: what the disk or the network reports arrives as the OSError that
it is, and an input/output error of ffmpeg is known to be about the file.
"""

import errno
import io
import mmap
from pathlib import Path
from typing import Any

import av

from stm.storage.machine_errors import is_machine_error

_LARGEST_ALLOCATION = 2**31 - 1  # bytes; ffmpeg answers larger requests, which damaged files make, with ENOMEM


class _Source(io.FileIO):
    """A file that PyAV reads; closed with the container, which holds the only reference."""

    failed = False

    def read(self, size: int | None = -1, /) -> bytes:
        if self.failed:  # some demuxers go on reading, but PyAV raises only the first error
            return b""
        try:
            return super().read(-1 if size is None else size)
        except OSError as error:
            self.failed = True
            raise OSError(error.errno, error.strerror, self.name) from None

    def seek(self, offset: int, whence: int = 0, /) -> int:
        try:
            return super().seek(offset, whence)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return -errno.EINVAL  # damaged files point to negative positions; ffmpeg handles this

    def __del__(self) -> None:
        self.close()


def open_media(path: Path, **arguments: Any) -> Any:
    """Open a file with `av.open(..., **arguments)`. Reading it then raises OSError if the machine fails.

    Titles and other texts in the file may be in any encoding; bytes that are not UTF-8 are replaced.

    Raises:
        OSError: the file cannot be opened or read.
        av.FFmpegError: ffmpeg does not recognise it.
    """
    return av.open(_Source(str(path)), "r", metadata_errors="replace", **arguments)


def is_from_machine(error: BaseException) -> bool:
    """Whether an error raised while reading a file of `open_media` is one of the machine, which must stop the job."""
    if isinstance(error, av.FFmpegError):
        return error.errno == errno.ENOMEM and _memory_is_short()
    return is_machine_error(error)


def _memory_is_short() -> bool:
    try:
        mmap.mmap(-1, _LARGEST_ALLOCATION).close()  # reserves addresses only
    except (OSError, MemoryError):
        return True
    return False
