"""Worker processes that send many parts per item, such as the clips of a video, which arrive in the order of the items.

The order makes what is computed from the parts independent of the number of processes. Memory is bounded: a worker that is
ahead of the item whose turn it is waits once enough parts are kept for later. Isolation is that of `stm.jobs.workers`.
"""

import logging
import signal
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from stm.jobs.workers import (
    ORPHAN_GRACE_SECONDS,
    Failure,
    MachineError,
    Unfinished,
    Worker,
    attempt,
    check_starts,
    describe_end,
    prepare_worker,
    raise_killed,
    timed_out,
    wait_for,
)

_log = logging.getLogger(__name__)

Item = TypeVar("Item")


class Turn(Enum):
    """What happens to an item besides its parts."""

    RESTARTED = auto()  # its process ended, and it begins anew: the parts so far are void
    FINISHED = auto()  # all of its parts have been yielded
    GIVEN_UP = auto()  # the machine ended its process twice: the parts so far are void, and an error follows all items


def stream_isolated(
    function: Callable[[Item], Iterator[Any]],
    items: Sequence[Item],
    processes: int,
    timeout_seconds: float,
    name: Callable[[Item], str] = str,
    *,
    ahead: int = 64,
) -> Generator[tuple[int, Any], None, None]:
    """Yield `(index of the item, part)` for each part that `function(item)` yields, item by item.

    After an item's parts comes `Turn.FINISHED`, a Failure if it raised an exception, crashed or reached a deadline, or
    `Turn.GIVEN_UP`; errors of the machine are raised here, as by `run_isolated`. An item whose process did not survive is tried
    again at its turn, after `Turn.RESTARTED`, with no other worker beside it.

    Args:
        function: a generator function from an importable module; it is pickled, and so are the items and parts.
        items: the arguments, one per call.
        processes: the number of items processed in parallel.
        timeout_seconds: wall-clock limit per part.
        name: returns an item's name for error messages.
        ahead: maximum number of parts in memory for later; at least one more per process waits in the process.

    Raises:
        OSError, DamagedError: raised by `function`.
        ItemKilledError: the second attempts at some items were killed from outside or ran out of memory, too; raised after all
            other items.
        WorkerStartError: the processes cannot be started.
    """
    pool = _Pool(function, items, processes, timeout_seconds, ahead)
    killed: list[str] = []
    try:
        for index, item in enumerate(items):
            outcome = yield from pool.run(index)
            if isinstance(outcome, Unfinished):
                _log.warning(f"{name(item)}: {outcome.failure.detail}; tried again, alone")
                yield index, Turn.RESTARTED
                pool.end()
                outcome = yield from pool.run(index, alone=True)
            if isinstance(outcome, MachineError):
                raise outcome.explain(name(item))
            if isinstance(outcome, Unfinished):
                if outcome.by_machine:
                    killed.append(f"{name(item)}: {outcome.failure.detail}")
                    outcome = Turn.GIVEN_UP
                else:
                    outcome = outcome.failure
            yield index, outcome
    finally:
        pool.end()
    raise_killed(killed)


@dataclass(frozen=True)
class _Part:
    """A message that is a part, to tell it from an outcome."""

    value: Any


@dataclass
class _Stream:
    """What has arrived of an item."""

    parts: deque[Any] = field(default_factory=deque)
    outcome: Any = None  # Turn.FINISHED, Failure, MachineError or Unfinished; None: there is more to come


class _Pool:
    """The workers, and what they have sent of items whose turn has not come."""

    def __init__(
        self,
        function: Callable[[Any], Iterator[Any]],
        items: Sequence[Any],
        processes: int,
        timeout: float,
        ahead: int,
    ) -> None:
        self._function = function
        self._items = items
        self._processes = processes
        self._timeout = timeout
        self._ahead = ahead
        self._workers: list[Worker] = []
        self._streams: dict[int, _Stream] = {}
        self._failed_starts = 0

    def end(self) -> None:
        """End all workers and forget what they have sent."""
        for worker in self._workers:
            worker.end()
        self._workers.clear()
        self._streams.clear()

    def run(self, head: int, alone: bool = False) -> Generator[tuple[int, Any], None, Any]:
        """Yield the parts of the item whose turn it is; return its outcome."""
        while True:
            stream = self._streams.get(head)
            while stream is not None and stream.parts:
                yield head, stream.parts.popleft()
            if stream is not None and stream.outcome is not None:
                del self._streams[head]
                return stream.outcome
            self._hand_out(head, alone)
            for worker in wait_for([worker for worker in self._workers if self._is_read(worker, head)]):
                self._receive(worker)

    def _has_room(self, head: int) -> bool:
        return sum(len(stream.parts) for index, stream in self._streams.items() if index != head) < self._ahead

    def _is_read(self, worker: Worker, head: int) -> bool:
        """Whether a worker's messages are read now; one that waits to be read has no deadline."""
        if not worker.ready or worker.index == head:
            return True
        return worker.index is not None and self._has_room(head)

    def _hand_out(self, head: int, alone: bool) -> None:
        """Start workers, and give the next items to those that have none."""
        waiting = [head] if alone else range(head, min(len(self._items), head + self._processes + self._ahead))
        todo = deque(index for index in waiting if index not in self._streams)
        busy = sum(worker.index is not None for worker in self._workers)
        while len(self._workers) < min(1 if alone else self._processes, busy + len(todo)):
            self._workers.append(Worker(self._function, self._timeout, _serve))
        for worker in [worker for worker in self._workers if worker.ready and worker.index is None]:
            if not todo or not (todo[0] == head or self._has_room(head)):
                return
            if worker.give(todo[0], self._items[todo[0]], self._timeout):
                self._streams[todo.popleft()] = _Stream()
            else:  # it has ended meanwhile
                worker.end()
                self._workers.remove(worker)

    def _receive(self, worker: Worker) -> None:
        """Take the next message of a worker; a worker that has ended is removed."""
        was_ready, index = worker.ready, worker.index
        message = _read(worker, self._timeout)
        if isinstance(message, Unfinished):
            worker.end()
            self._workers.remove(worker)
        else:
            worker.ready = True
        self._failed_starts = 0 if worker.ready else self._failed_starts + 1
        if self._failed_starts:
            check_starts(self._failed_starts, message)
        if not was_ready or index is None:
            return
        if isinstance(message, _Part):
            self._streams[index].parts.append(message.value)
            worker.deadline = time.monotonic() + self._timeout
        else:
            self._streams[index].outcome = message
            worker.index = None
            worker.deadline = float("inf")


def _read(worker: Worker, timeout: float) -> Any:
    if not worker.pipe.poll():
        return timed_out(timeout)
    try:
        return worker.pipe.recv()
    except (EOFError, OSError):  # OSError: killed in the middle of a message
        code = worker.end(grace=5.0)
        return timed_out(timeout) if code == -signal.SIGALRM else describe_end(code)


def _serve(pipe: Connection, function: Callable[[Any], Iterator[Any]], timeout: float) -> None:
    """Send the parts of items from a worker until its parent has no more items."""
    prepare_worker()
    try:
        pipe.send(None)
        while True:
            parts = attempt(function, pipe.recv())
            message = parts if isinstance(parts, Failure | MachineError | Unfinished) else _Part(None)
            while isinstance(message, _Part):
                signal.setitimer(signal.ITIMER_REAL, timeout + ORPHAN_GRACE_SECONDS)
                message = attempt(_next_part, parts)
                signal.setitimer(signal.ITIMER_REAL, 0)  # the parent may take its time to read
                pipe.send(message)
    except (EOFError, BrokenPipeError, ConnectionResetError):  # the parent has ended
        return


def _next_part(parts: Iterator[Any]) -> Any:
    for part in parts:
        return _Part(part)
    return Turn.FINISHED
