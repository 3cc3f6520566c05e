"""Handles signals that ask a run to stop: it saves after the current step, or at once if it waits for a batch, and exits
with a dedicated code.
"""

import logging
import os
import re
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from stm.jobs.lifetime import STOP_SIGNALS

_log = logging.getLogger(__name__)


class Interrupted(SystemExit):
    """The run was asked to stop. It has saved its state, if it could. The exit code is 128 + the signal number, so the job is
    retried.
    """


class Interruption:
    """Records SIGTERM (the job is cancelled or preempted) and SIGUSR1 (Slurm's warning) while the block runs.
    Only the main thread may set signal handlers; in other threads, nothing is recorded.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._patience: float | None = None  # in seconds, inside `waiting`
        self._before: dict[int, Any] = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        first = self.received is None
        self.received = number
        if first:
            self._set_alarm()

    def _set_alarm(self) -> None:
        if self._patience is not None:
            # Repeated, because an error that is raised inside a destructor or a callback of C code is lost.
            signal.setitimer(signal.ITIMER_REAL, self._patience, 1.0)

    def _give_up(self, number: int, frame: FrameType | None) -> None:
        if self._patience is not None:
            raise Interrupted(128 + (self.received or signal.SIGTERM))

    @contextmanager
    def waiting(self, seconds: float) -> Iterator[None]:
        """A block that may take long, such as waiting for a batch: a signal ends it after `seconds`.

        Raises:
            Interrupted: a signal was received before or during the block, which did not end in time. Nothing is saved yet.
        """
        self._patience = seconds
        try:
            if self.received is not None:
                self._set_alarm()
            yield
        finally:
            self._patience = None
            if self.received is not None:
                signal.setitimer(signal.ITIMER_REAL, 0)

    def stop(self, state: str) -> None:
        """Ends the run by raising `Interrupted`.

        Args:
            state: what is kept of the run, for the log.
        """
        number = self.received or signal.SIGTERM
        _log.warning(f"{signal.Signals(number).name}: {state}")
        raise Interrupted(128 + number)

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            handlers = {**dict.fromkeys(STOP_SIGNALS, self._note), signal.SIGALRM: self._give_up}
            self._before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


# Time limit of scontrol: waiting for a controller that is down would use up the job's grace time.
_ANSWER_SECONDS = 60


def requeue_if_preempted() -> bool:
    """Requeues this Slurm job if it is being preempted; returns whether it was.

    Slurm requeues the job itself when the partition's grace time has expired. A job that saves and exits before then counts
    as failed, and retrying it would use up one of the few retries that the workflow allows for errors. Without a grace time
    the job is already being requeued, and this function does nothing.

    Jobs that are cancelled or reach their time limit are not requeued: a cancelled job must not restart, and after a timeout
    the user decides whether to allow more attempts or a longer `runtime`.
    """
    job = os.environ.get("SLURM_JOB_ID", "")
    if not job.isdecimal():
        return False
    description = _scontrol("show", "job", job, "--oneliner")
    state, preempted = (re.search(rf"\b{key}=(\S+)", description) for key in ("JobState", "PreemptTime"))
    if state is None or preempted is None or state[1] != "RUNNING" or not preempted[1][0].isdigit():
        return False
    # Logged first: the job's processes end while Slurm requeues it.
    _log.info(f"Slurm is preempting job {job}: requeueing it")
    _scontrol("requeue", job)
    return True


def _scontrol(*words: str) -> str:
    """The output of scontrol; empty if it fails, in which case the run ends without being requeued."""
    try:
        done = subprocess.run(  # noqa: S603
            ["scontrol", *words],  # noqa: S607
            capture_output=True,
            text=True,
            check=True,
            timeout=_ANSWER_SECONDS,
        )
    except (OSError, subprocess.SubprocessError) as error:
        _log.warning(f"scontrol {words[0]}: {getattr(error, 'stderr', None) or error}".strip())
        return ""
    return done.stdout
