"""Looks at many video files in worker processes, so that a file that hangs or crashes a decoder costs one file."""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from pathlib import Path
from typing import Any

from pebble import ProcessExpired, ProcessPool

from stm.datasets.workers import PlainSpawn
from stm.manifest import Status

Facts = dict[str, Any]  # as `stm.datasets.probe.probe_file` returns them

_AHEAD = 64  # files handed out per worker before their results are waited for


def probe_files(
    paths: Sequence[Path], settings: Mapping[str, int], processes: int, timeout: float
) -> Iterator[tuple[Path, Facts]]:
    """Looks at many files in worker processes; yields (path, facts) in the order of `paths`.

    Args:
        settings: `min_side` and `max_side` of `probe_file`.
        timeout: seconds for one file.
    """
    done = 0
    while done < len(paths):
        before = done
        for path, facts in _probe_in_pool(paths[done:], settings, processes, timeout):
            done += 1
            yield path, facts
        if done == before:
            raise RuntimeError("the processes that open the videos end before they take any work; see their messages")


def _probe_in_pool(
    paths: Sequence[Path], settings: Mapping[str, int], processes: int, timeout: float
) -> Iterator[tuple[Path, Facts]]:
    """Yields results in order; ends early when the pool breaks, as it does when a worker dies between two files."""
    rest = iter(paths)
    workers = max(1, min(processes, len(paths)))
    pool = ProcessPool(max_workers=workers, context=PlainSpawn())

    def submit(path: Path) -> tuple[Path, Future[Facts]]:
        return path, pool.schedule(_probe, args=(path,), kwargs=dict(settings), timeout=timeout)

    try:
        waiting = deque(submit(path) for path in islice(rest, workers * _AHEAD))
        while waiting:
            path, future = waiting.popleft()
            try:
                facts = _result(future, timeout)
            except BrokenProcessPool:
                return
            yield path, facts
            waiting.extend(submit(following) for following in islice(rest, 1))
    finally:
        pool.stop()
        pool.join()


def _result(future: Future[Facts], timeout: float) -> Facts:
    try:
        return future.result()
    except FutureTimeout:
        return {"status": Status.TIMEOUT, "detail": f"did not open within {timeout:g} s"}
    except ProcessExpired as error:
        return {"status": Status.CRASHED, "detail": f"opening it killed the process (exit code {error.exitcode})"}
    except BrokenProcessPool:
        raise
    except Exception as error:  # the file brought a library to its knees, but not the process
        return {"status": Status.CRASHED, "detail": f"opening it failed: {type(error).__name__}: {error}"}


def _probe(path: Path, min_side: int, max_side: int) -> Facts:
    from stm.datasets.probe import probe_file  # PyAV is loaded in the workers only

    return probe_file(path, min_side, max_side)
