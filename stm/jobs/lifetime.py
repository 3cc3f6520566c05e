"""Ends of processes: signals that ask a run to stop reach its training process alone, and no process outlives its parent."""

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""SIGTERM (the job is cancelled or preempted) and SIGUSR1 (Slurm's warning)."""

_PR_SET_PDEATHSIG = 1  # from linux/prctl.h


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Blocks `STOP_SIGNALS` in processes and threads started inside the block, such as loading processes, so that only the
    training loop handles them: if a signal killed a loading process, the run would end before saving. Signals that arrive
    during the block are delivered to this process after it.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent(parent: int | None = None) -> None:
    """Has the kernel kill this process when its parent ends, however that happens (Linux only).

    A process whose parent was killed would otherwise keep training, and write to the folder of the run that replaces it. The
    setting survives `exec`, not `fork`. "Parent" is the thread that started this process: it must live as long as it.

    Args:
        parent: process id of the parent, where it is known: if another process has taken its place by now, this one ends.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
