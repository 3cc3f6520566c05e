"""The processes that load batches: how they start, how they end, and what their failures mean."""

import errno
import gc
import multiprocessing
import multiprocessing.queues
import os
import re
import shutil
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.context import ForkContext, ForkProcess
from multiprocessing.popen_fork import Popen
from typing import Any

import cv2
import torch

from stm.jobs.lifetime import end_with_parent

SHARED_MEMORY = "/dev/shm"  # noqa: S108 (where torch passes tensors between processes)

_LEAVE_SECONDS = 0.5
"""How long a loading process may take to leave before it is killed. What it is still loading is not needed."""


class _Popen(Popen):
    def terminate(self) -> None:
        # torch and multiprocessing end processes by SIGTERM, which is blocked here (see `signals_blocked`), and then wait for
        # them: a program that ends with an error would wait forever.
        self.kill()


class _LoadingProcess(ForkProcess):
    @staticmethod
    def _Popen(process_obj: Any) -> Popen:
        return _Popen(process_obj)

    def join(self, timeout: float | None = None) -> None:
        # torch waits for one process after another, five seconds for each, before it kills those that are stuck.
        super().join(timeout if timeout is None else min(timeout, _LEAVE_SECONDS))


class LoadingContext(ForkContext):
    """A multiprocessing context for torch's DataLoader whose processes can always be ended."""

    Process = _LoadingProcess


def start_loading(worker: int) -> None:
    """Prepares a loading process; the `worker_init_fn` of a DataLoader."""
    cv2.setNumThreads(0)  # the loading processes already use all cores
    gc.freeze()  # what was there before is not garbage: looking through it again and again costs time and copies its memory
    parent = multiprocessing.parent_process()
    end_with_parent(None if parent is None else parent.pid)
    # The default prints the error and drops the batch, for which the training process would wait forever.
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_give_up)  # type: ignore[attr-defined]


def _give_up(error: BaseException, batch: Any) -> None:
    """Ends a loading process that cannot send a batch."""
    traceback.print_exception(error)
    sys.stderr.flush()
    os._exit(1)


_CODE = re.compile(r"\((\d+)\)\s*$")
"""The errno at the end of torch's messages about shared memory."""


def is_loading_process() -> bool:
    """Whether this process loads batches for another one."""
    return torch.utils.data.get_worker_info() is not None


def share(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, in shared memory if this is a loading process.

    torch would otherwise move it there when it sends the batch, in a thread whose errors do not reach the training process.

    Raises:
        MemoryError: shared memory is full.
        OSError: a file of shared memory cannot be made, for instance because too many are open.
    """
    if not is_loading_process():
        return tensor
    try:
        return tensor.share_memory_()
    except RuntimeError as error:
        code = _CODE.search(str(error))
        if code is None:
            raise
        if int(code[1]) == errno.ENOSPC:
            raise MemoryError(_describe_shared_memory()) from error
        raise OSError(f"{SHARED_MEMORY}: {error}") from error


def _describe_shared_memory() -> str:
    total, _, free = shutil.disk_usage(SHARED_MEMORY)
    return (
        f"{SHARED_MEMORY} is full ({_format(total)} in total, {_format(free)} free): loading processes pass their batches "
        "through it. Make it larger (docker run --shm-size=8g or --ipc=host; mount -o remount,size=8g), or lower `workers` or "
        "the batch size; `workers: 0` does not need it"
    )


def _format(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


_LOST = re.compile(r"DataLoader worker.*(killed by signal|exited unexpectedly)")


@contextmanager
def explain_lost_processes() -> Iterator[None]:
    """Adds what to do to torch's errors about a loading process that was killed. torch raises them wherever the program is at
    that moment.
    """
    try:
        yield
    except RuntimeError as error:
        message = str(error).strip()
        if not _LOST.match(message):
            raise
        why = "unless its message is above, the job or the machine ran out of memory: request more, or lower `workers`"
        if "Bus error" in message:
            why = f"usually because {_describe_shared_memory()}"
        raise RuntimeError(f"a loading process ended; {why} ({message})") from error
