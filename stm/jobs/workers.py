"""Worker processes that run one function on many items, isolated so that an item that hangs or crashes affects no others.

Decoders are native code: a damaged file can make one loop forever while holding the interpreter lock, or crash its
process. Only the operating system can stop that, so each item has a deadline after which its process is killed.

The machine ends processes, too: when it is out of memory, or when somebody kills them. An item whose process did not
survive is therefore tried again with no other worker beside it, and the second attempt decides.
"""

import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
import types
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnContext, SpawnProcess
from multiprocessing.reduction import ForkingPickler
from typing import Any, TypeVar

from stm.jobs.lifetime import end_with_parent
from stm.jobs.messages import inherit_messages
from stm.jobs.status import Status
from stm.storage.machine_errors import is_machine_error, is_out_of_memory
from stm.storage.tables import DamagedError

_log = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")

# Where the kernel does not end workers with their parent (see `end_with_parent`), nothing enforces the deadlines of a killed
# parent's workers: they then end themselves this long after it.
ORPHAN_GRACE_SECONDS = 30.0
# If so many processes in a row end before they start any work, the environment is broken: it takes more if they are
# killed from outside than if they end by themselves.
_MAX_FAILED_STARTS = 5
_MAX_KILLED_STARTS = 30
# `_without_main` and `_single_threaded` change global state, so only one process may be started at a time.
_LAUNCH = threading.Lock()
# Signals that native code raises itself. All others come from outside the process, as SIGKILL does, or from a disk:
# SIGBUS means that a page of a mapped file, such as a library, cannot be read.
_CRASHES = {signal.SIGSEGV, signal.SIGABRT, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP}


@dataclass(frozen=True)
class Failure:
    """The outcome of an item without a result: its process was killed at the deadline or crashed."""

    status: Status  # TIMEOUT or CRASHED
    detail: str


class ItemKilledError(RuntimeError):
    """The processes of items were killed, or ran out of memory, twice; the message names the items and the remedy."""


class WorkerStartError(RuntimeError):
    """Worker processes cannot be started."""


@dataclass(frozen=True)
class Unfinished:
    """An attempt that says nothing about the item unless it repeats."""

    failure: Failure
    by_machine: bool  # the process was killed from outside or ran out of memory


@dataclass(frozen=True)
class MachineError:
    """An error of the machine or of a stage's output, raised by the function: it ends the job."""

    error: Exception

    def explain(self, item: str) -> Exception:
        """Return the error with the item in its message, if it does not name a file."""
        code, reason = getattr(self.error, "errno", None), getattr(self.error, "strerror", None)
        if code is None or getattr(self.error, "filename", None) is not None:
            self.error.add_note(f"while processing {item}")
            return self.error
        return OSError(code, f"{reason}; while processing {item}")


def run_isolated(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    processes: int,
    timeout_seconds: float,
    name: Callable[[Item], str] = str,
    *,
    retry: bool = True,
) -> Iterator[tuple[int, Result | Failure]]:
    """Yield `(index of the item, function(item) or Failure)` in the order in which items finish.

    An exception in `function` becomes a `crashed` Failure, except for OSError, DamagedError and the errors of
    `is_machine_error`, which are raised here: they indicate a problem with the machine (a full disk, a lost mount) or with
    a stage's output rather than with the item.

    An item whose process was killed or crashed, ran out of memory or reached the deadline is tried again after all others,
    alone. If the second attempt has a result, the first counts as nothing.

    Args:
        function: a function from an importable module (not the main script); it is pickled, and so are the items.
        items: the arguments, one per call.
        processes: the number of items processed in parallel; each process handles many items in turn.
        timeout_seconds: wall-clock limit per attempt, after which its process is killed.
        name: returns an item's name for error messages.
        retry: whether to try such items again; if not, their first attempts are their Failures.

    Raises:
        OSError, DamagedError: raised by `function`.
        ItemKilledError: the second attempts at some items were killed from outside or ran out of memory, too; raised
            after all other items.
        WorkerStartError: the processes cannot be started.
        ValueError: `function` is defined in the main script.
    """
    if getattr(function, "__module__", None) == "__main__":
        raise ValueError(
            f"{function!r} is defined in the main script; worker processes can only import it from a module"
        )
    again: list[int] = []
    for index, outcome in _run_pool(function, items, range(len(items)), processes, timeout_seconds):
        if isinstance(outcome, Unfinished) and retry:
            again.append(index)
        elif isinstance(outcome, Unfinished):
            yield index, outcome.failure
        else:
            yield index, _raise_machine_error(outcome, items[index], name)
    if again:
        _log.warning(f"{len(again)} whose process was killed, crashed or timed out: tried again, one by one")
    killed: list[str] = []
    for index in sorted(again):
        for _, outcome in _run_pool(function, items, [index], 1, timeout_seconds):
            if not isinstance(outcome, Unfinished):
                yield index, _raise_machine_error(outcome, items[index], name)
            elif outcome.by_machine:
                killed.append(f"{name(items[index])}: {outcome.failure.detail}")
            else:
                yield index, outcome.failure
    raise_killed(killed)


def raise_killed(killed: Sequence[str]) -> None:
    """Raise ItemKilledError if there are such items.

    Args:
        killed: the name of each, and how its second attempt ended.
    """
    if killed:
        raise ItemKilledError(
            "not finished, although tried a second time with no other worker beside it:\n"
            + "".join(f"  {line}\n" for line in killed)
            + "Finished work is kept: run again, with more memory for the job. Leave out of the dataset what never fits."
        )


def _raise_machine_error(outcome: Any, item: Item, name: Callable[[Item], str]) -> Any:
    if isinstance(outcome, MachineError):
        raise outcome.explain(name(item))
    return outcome


class Worker:
    """A process with a pipe of its own: killed at any moment, it holds nothing that other workers wait for."""

    def __init__(
        self, function: Callable[[Any], Any], timeout: float, serve: Callable[..., None] | None = None
    ) -> None:
        context = PlainSpawn()
        self.pipe, end = context.Pipe()
        self._process = context.Process(target=serve or _serve, args=(end, function, timeout), daemon=True)
        self._process.start()
        end.close()
        self.ready = False  # whether the process has started
        self.index: int | None = None  # of the item in work
        self.deadline = float("inf")

    def give(self, index: int, item: Any, timeout: float) -> bool:
        """Start the work on an item; False if the process has ended meanwhile."""
        try:
            self.pipe.send(item)
        except (BrokenPipeError, ConnectionResetError):
            return False
        self.index = index
        self.deadline = time.monotonic() + timeout
        return True

    def end(self, grace: float = 0.0) -> int:
        """Kill the process if it does not end by itself within `grace` seconds; return its exit code."""
        if grace:
            self._process.join(grace)
        self._process.kill()
        self._process.join()
        self.pipe.close()
        return self._process.exitcode or 0


def _run_pool(
    function: Callable[[Item], Any], items: Sequence[Item], todo: Sequence[int], processes: int, timeout: float
) -> Iterator[tuple[int, Any]]:
    """Yield `(index, outcome)` of one attempt at each item of `todo`, in the order in which they end."""
    waiting = deque(todo)
    workers: list[Worker] = []
    failed_starts = 0
    try:
        while waiting or any(worker.index is not None for worker in workers):
            busy = sum(worker.index is not None for worker in workers)
            while len(workers) < max(1, min(processes, len(waiting) + busy)):
                workers.append(Worker(function, timeout))
            for worker in workers:
                idle = worker.ready and worker.index is None
                if idle and waiting and worker.give(waiting[0], items[waiting[0]], timeout):
                    waiting.popleft()
            for worker in wait_for(workers):
                was_ready, index = worker.ready, worker.index
                outcome, alive = _receive(worker, timeout)
                if not alive:
                    workers.remove(worker)
                failed_starts = 0 if worker.ready else failed_starts + 1
                if failed_starts:
                    check_starts(failed_starts, outcome)
                if was_ready and index is not None:
                    yield index, outcome
    finally:
        for worker in workers:
            worker.end()


def check_starts(failed: int, last: Unfinished) -> None:
    """Raise WorkerStartError if too many processes in a row ended before they started any work."""
    if failed >= (_MAX_KILLED_STARTS if last.by_machine else _MAX_FAILED_STARTS):
        raise WorkerStartError(
            f"{failed} worker processes ended before they started any work, the last because {last.failure.detail}; see "
            "their messages above"
        )


def wait_for(workers: Sequence[Worker]) -> list[Worker]:
    """Return the workers that have sent a message, have ended or have reached their deadline, as soon as there are any."""
    remaining = min(worker.deadline for worker in workers) - time.monotonic()
    readable = wait([worker.pipe for worker in workers], None if remaining == float("inf") else max(0.0, remaining))
    now = time.monotonic()
    return [worker for worker in workers if worker.pipe in readable or worker.deadline <= now]


def _receive(worker: Worker, timeout: float) -> tuple[Any, bool]:
    """Return a worker's outcome, and whether it can work on; its message that it is ready is no outcome."""
    if not worker.pipe.poll():
        worker.end()
        return timed_out(timeout), False
    try:
        outcome = worker.pipe.recv()
    except (EOFError, OSError):  # OSError: killed in the middle of a message
        code = worker.end(grace=5.0)
        # A function may set alarms for parts of its work, as `stm.preprocess.sub_clips` does.
        return timed_out(timeout) if code == -signal.SIGALRM else describe_end(code), False
    worker.ready = True
    worker.index = None
    worker.deadline = float("inf")
    if isinstance(outcome, Unfinished):  # out of memory: only the end of the process surely frees it
        worker.end()
        return outcome, False
    return outcome, True


def timed_out(timeout: float) -> Unfinished:
    """Describe the end of a process that was killed at its deadline."""
    detail = f"not finished after {timeout:g} s; its process was killed"
    return Unfinished(Failure(Status.TIMEOUT, detail), by_machine=False)


def describe_end(code: int) -> Unfinished:
    """Describe the end of a process by its exit code, or by the negative number of the signal that ended it."""
    if code >= 0:
        return Unfinished(Failure(Status.CRASHED, f"its process ended with exit code {code}"), by_machine=False)
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hint = "; the machine may be out of memory" if name == "SIGKILL" else ""
    return Unfinished(Failure(Status.CRASHED, f"its process was ended by {name}{hint}"), -code not in _CRASHES)


def _serve(pipe: Connection, function: Callable[[Any], Any], timeout: float) -> None:
    """Process items in a worker until its parent has no more."""
    prepare_worker()
    try:
        pipe.send(None)
        while True:
            item = pipe.recv()
            signal.setitimer(signal.ITIMER_REAL, timeout + ORPHAN_GRACE_SECONDS)
            outcome = attempt(function, item)
            signal.setitimer(signal.ITIMER_REAL, 0)
            pipe.send(outcome)
    except (EOFError, BrokenPipeError, ConnectionResetError):  # the parent has ended
        return


def prepare_worker() -> None:
    """Make the process end with its parent, at an alarm, and when its parent ends it, but not on Ctrl-C; print its messages."""
    inherit_messages()
    parent = multiprocessing.parent_process()
    end_with_parent(None if parent is None else parent.pid)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Ctrl-C, the parent ends its workers
    # The default action of an alarm kills the process even inside native code.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # A parent that defers signals passes on its mask.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM, signal.SIGTERM})


def attempt(function: Callable[[Any], Any], item: Any) -> Any:
    """Return `function(item)`, or its error as an `Unfinished`, `MachineError` or `Failure`."""
    try:
        return function(item)
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        if is_out_of_memory(error):
            return Unfinished(Failure(Status.CRASHED, text), by_machine=True)
        if isinstance(error, (OSError, DamagedError)) or is_machine_error(error):
            return MachineError(error if _can_travel(error) else OSError(text))
        return Failure(Status.CRASHED, text)


def _can_travel(error: Exception) -> bool:
    """Whether the parent can receive an exception: some cannot be rebuilt from their arguments."""
    try:
        ForkingPickler.loads(ForkingPickler.dumps(error))
    except Exception:  # whatever its class raises
        return False
    return True


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
