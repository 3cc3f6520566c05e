"""Errors of the machine: a failing disk, a lost mount, too little memory. They say nothing about a clip.

Such an error must stop the job, which then resumes from its journal. Recorded as a property of the clip, it would change
the data for good.
"""

import errno
import os
from pathlib import Path

# Kept narrow: ENOENT, EACCES and EINVAL can be a property of one file.
MACHINE_ERRNOS = frozenset(
    getattr(errno, name)
    for name in (
        *("EIO", "ESTALE", "EREMOTEIO", "ENODEV", "ENXIO", "ENOTCONN", "ETIMEDOUT", "ECONNRESET", "ECONNABORTED"),
        *("EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH", "ESHUTDOWN", "EPIPE", "EBADF"),
        *("ENOMEM", "EAGAIN", "EMFILE", "ENFILE", "ENOSPC", "EDQUOT", "EROFS", "ENOLCK"),
    )
    if hasattr(errno, name)
)


# The code of OpenCV's errors for a failed allocation.
_CV_NO_MEMORY = -4


def is_machine_error(error: BaseException) -> bool:
    """Whether an error comes from the machine rather than from the data; also for PyAV's errors, which carry `errno`."""
    return is_out_of_memory(error) or getattr(error, "errno", None) in MACHINE_ERRNOS


def name_file(error: Exception, path: Path) -> Exception:
    """Return an OSError that names the file; other errors unchanged."""
    if not isinstance(error, OSError) or error.errno is None or error.filename is not None:
        return error
    return OSError(error.errno, error.strerror or os.strerror(error.errno), str(path))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory could not be allocated; with fewer processes beside it, the same work may succeed."""
    if type(error).__module__ == "cv2" and getattr(error, "code", None) == _CV_NO_MEMORY:
        return True
    return isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM
