"""Errors of the machine: a failing disk, a lost mount, too little memory. They say nothing about a clip.

Such an error must stop the job, which then resumes from its journal. Recorded as a property of the clip, it would change
the data for good.
"""

import errno

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


def is_machine_error(error: BaseException) -> bool:
    """Whether an error comes from the machine rather than from the data; also for PyAV's errors, which carry `errno`."""
    return isinstance(error, MemoryError) or getattr(error, "errno", None) in MACHINE_ERRNOS
