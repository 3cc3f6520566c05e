"""Worker processes that run one function on many items, isolated so that an item that hangs or crashes affects no others.

Decoders are native code: a damaged file can make one loop forever while holding the interpreter lock, or crash its
process. Only the operating system can stop that, so each item has a deadline after which its process is killed.
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

# If its parent was killed, nothing enforces a worker's deadline: the worker then ends itself this long after the deadline.
_ORPHAN_GRACE_SECONDS = 30.0
# `_without_main` and `_single_threaded` change global state, so only one process may be started at a time.
_LAUNCH = threading.Lock()


@dataclass(frozen=True)
class Failure:
    """The outcome of an item without a result: its process was killed at the deadline or crashed."""

    status: Status  # TIMEOUT or CRASHED
    detail: str


def run_isolated(
    function: Callable[[Item], Result], items: Sequence[Item], processes: int, timeout_seconds: float
) -> Iterator[tuple[int, Result | Failure]]:
    """Yield `(index of the item, function(item) or Failure)` in the order in which items finish.

    An exception in `function` becomes a `crashed` Failure, except for OSError, which is re-raised here: it indicates a problem
    with the machine (a full disk, a lost mount) rather than with the item.

    Args:
        function: a function from an importable module (not the main script); it is pickled, and so are the items.
        items: the arguments, one per call.
        processes: the number of items processed in parallel; each process handles many items in turn.
        timeout_seconds: wall-clock limit per item, after which its process is killed.

    Raises:
        OSError: raised by `function`.
        RuntimeError: the processes cannot be started.
        ValueError: `function` is defined in the main script.
    """
    if getattr(function, "__module__", None) == "__main__":
        raise ValueError(
            f"{function!r} is defined in the main script; worker processes can only import it from a module"
        )
    remaining = list(range(len(items)))
    while remaining:
        finished: set[int] = set()
        for index, outcome in _run_pool(function, items, remaining, processes, timeout_seconds):
            finished.add(index)
            yield index, outcome
        if not finished:
            raise RuntimeError("worker processes exit before they start any work; see their messages above")
        # If the pool broke (a process died between two items), a new pool processes the remaining items.
        remaining = [index for index in remaining if index not in finished]


def _run_pool(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    todo: Sequence[int],
    processes: int,
    timeout: float,
) -> Iterator[tuple[int, Result | Failure]]:
    pool = ProcessPool(max_workers=max(1, min(processes, len(todo))), context=PlainSpawn())
    try:
        pending: dict[Future[Any], int] = {
            pool.schedule(_call, args=(function, items[index], timeout), timeout=timeout): index for index in todo
        }
        while pending:
            done, _ = wait(pending, return_when=FIRST_COMPLETED)
            for future in sorted(done, key=pending.__getitem__):
                index = pending.pop(future)
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
        if error.args[:1] != ("Task timeout",):  # raised by the function, not by the pool
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
    """Run the function in the worker, under an alarm whose default action kills the process even inside native code."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, timeout + _ORPHAN_GRACE_SECONDS)
    try:
        return function(item)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


class _Process(SpawnProcess):
    """A spawned process that does not import the caller's main script.

    Python's `spawn` imports the main script in every child. Workflow scripts and notebooks have no main guard, so each
    child would start the whole job again. Forking is not an option, because the parent already has threads.
    """

    @staticmethod
    def _Popen(process_obj: Any) -> Any:
        with _LAUNCH, _without_main(), _single_threaded():
            return SpawnProcess._Popen(process_obj)


class PlainSpawn(SpawnContext):
    """A multiprocessing context whose processes do not import the main script."""

    Process = _Process


@contextmanager
def _without_main() -> Iterator[None]:
    """Hide the main script while a child's start-up data is written, which takes milliseconds."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


@contextmanager
def _single_threaded() -> Iterator[None]:
    """Make children inherit a limit of one thread for numpy's matrix products: there is already one process per core.

    Without the limit, the codec backend was measured to be ten times slower: threads spin on products that are too small.
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
