"""Signals that ask a run to stop: it saves at the next step's end and leaves with a code that says so."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from stm.training.logs import say


class Interrupted(SystemExit):
    """The run was asked to stop and has saved its state. The exit code is 128 + the signal, so the job is
    retried.
    """


class Interruption:
    """Notes SIGTERM (a job that is cancelled or preempted) and SIGUSR1 (Slurm's warning) while the block
    runs.

    Only the main thread may set handlers; elsewhere nothing is noted.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number

    def stop(self, step: int) -> None:
        """Leaves the run, whose state after `step` steps is saved."""
        number = self.received or signal.SIGTERM
        say(f"{signal.Signals(number).name}: saved after step {step}; the same command goes on from there")
        raise Interrupted(128 + number)

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


@contextmanager
def signals_blocked() -> Iterator[None]:
    """What is started in this block (loading processes and threads) never gets the signals; they are the
    loop's.

    A loading process that died of one would end the run before it has saved. This process gets them after the
    block.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, Interruption.SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
