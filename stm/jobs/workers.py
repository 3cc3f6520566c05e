"""Runs one function on many items in processes of their own, so that an item can hang or crash and no other notices.

Decoders are native code: a damaged file can make one loop for ever with the interpreter lock held, or take its process
down. Only the operating system can end that, so each item has a deadline after which its process is killed.
"""

import os
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any, TypeVar

from pebble import ProcessExpired, ProcessPool

from stm.jobs.status import Status

Item = TypeVar("Item")
Result = TypeVar("Result")

# An orphan (its parent was killed outright) ends itself so long after the deadline that nobody enforced.
_ORPHAN_GRACE_SECONDS = 30.0
_LAUNCH = threading.Lock()


@dataclass(frozen=True)
class Failure:
    """An item without a result: its process was killed at the deadline, or died."""

    status: Status  # TIMEOUT or CRASHED
    detail: str


def run_isolated(
    function: Callable[[Item], Result], items: Sequence[Item], processes: int, timeout_seconds: float
) -> Iterator[tuple[int, Result | Failure]]:
    """Yields `(index of the item, function(item) or Failure)` in the order in which items finish.

    Args:
        function: a function of an importable module (not of the main script); it and the items are pickled.
        items: what to work on; an item that hangs or crashes takes none of the others with it.
        processes: how many items are worked on at a time; each process is used for many items.
        timeout_seconds: wall-clock time of one item, its process is killed after it.

    An exception of `function` becomes a `crashed` Failure, except an OSError: that says that the machine is in trouble
    (a full disk, a lost mount), which is no property of one item, so it is raised here.

    Raises:
        OSError: `function` raised one.
        RuntimeError: the processes cannot be started at all.
        ValueError: `function` belongs to the main script.
    """
    if getattr(function, "__module__", None) == "__main__":
        raise ValueError(
            f"{function!r} is defined in the main script; worker processes can only import it from a module"
        )
    left = list(range(len(items)))
    while left:
        finished: set[int] = set()
        for index, outcome in _run_pool(function, items, left, processes, timeout_seconds):
            finished.add(index)
            yield index, outcome
        if not finished:
            raise RuntimeError("worker processes end before they take any work; see their messages above")
        # The pool broke (a process died between two items): what is left goes to a new one.
        left = [index for index in left if index not in finished]


def _run_pool(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    todo: Sequence[int],
    processes: int,
    timeout: float,
) -> Iterator[tuple[int, Result | Failure]]:
    pool = ProcessPool(max_workers=max(1, min(processes, len(todo))), context=PlainSpawn())
    try:
        waiting: dict[Future[Any], int] = {
            pool.schedule(_call, args=(function, items[index], timeout), timeout=timeout): index for index in todo
        }
        while waiting:
            done, _ = wait(waiting, return_when=FIRST_COMPLETED)
            for future in sorted(done, key=waiting.__getitem__):
                index = waiting.pop(future)
                try:
                    outcome = _outcome(future, timeout)
                except BrokenProcessPool:
                    return
                yield index, outcome
    finally:
        pool.stop()
        pool.join()


def _outcome(future: Future[Any], timeout: float) -> Any:
    try:
        return future.result()
    except TimeoutError as error:
        if error.args[:1] != ("Task timeout",):  # the function's own, not the pool's
            raise
        return Failure(Status.TIMEOUT, f"not finished after {timeout:g} s; its process was killed")
    except ProcessExpired as error:
        return Failure(Status.CRASHED, _describe_exit(error.exitcode))
    except (OSError, BrokenProcessPool):
        raise
    except Exception as error:
        return Failure(Status.CRASHED, f"{type(error).__name__}: {error}")


def _describe_exit(code: int) -> str:
    if code >= 0:
        return f"its process ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hint = "; the machine may be out of memory" if name == "SIGKILL" else ""
    return f"its process was ended by {name}{hint}"


def _call(function: Callable[[Item], Result], item: Item, timeout: float) -> Result:
    """Runs in the worker. The alarm's default action kills the process even when native code holds the lock."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, timeout + _ORPHAN_GRACE_SECONDS)
    try:
        return function(item)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


class _Process(SpawnProcess):
    """A spawned process that does not run the caller's main script again.

    Python's `spawn` imports the main script in every child. Workflow scripts and notebooks have no main guard, so each
    child would start the whole job anew. Spawn, not fork: the parent has threads by then.
    """

    @staticmethod
    def _Popen(process_obj: Any) -> Any:
        with _LAUNCH, _without_main(), _single_threaded():
            return SpawnProcess._Popen(process_obj)


class PlainSpawn(SpawnContext):
    """The multiprocessing context of such processes."""

    Process = _Process


@contextmanager
def _without_main() -> Iterator[None]:
    """Hides the main script for the milliseconds in which a child's start-up instructions are written."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


@contextmanager
def _single_threaded() -> Iterator[None]:
    """Children inherit one thread for numpy's products: a process a core is there already.

    Without it the codec backend was measured ten times slower: the threads spin on products that are too small.
    """
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
