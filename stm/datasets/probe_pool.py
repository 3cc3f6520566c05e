"""Probes many video files in worker processes: a file that hangs or crashes a decoder does not affect the others."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stm.jobs.workers import Failure, run_isolated

Facts = dict[str, Any]  # the values returned by `stm.datasets.probe.probe_file`


@dataclass(frozen=True)
class _Task:
    path: Path
    settings: Mapping[str, int]


def probe_files(
    paths: Sequence[Path], settings: Mapping[str, int], processes: int, timeout: float
) -> Iterator[tuple[Path, Facts]]:
    """Probes many files in worker processes; yields (path, facts) in order of completion.

    Args:
        settings: `min_side` and `max_side` of `probe_file`.
        timeout: seconds per file.

    Raises:
        ItemKilledError: the machine ended the work on some files, twice; all others have been yielded.
        OSError: an error of the machine, such as a failing disk.
    """
    tasks = [_Task(path, settings) for path in paths]
    for index, outcome in run_isolated(_probe, tasks, processes, timeout, _name):
        if isinstance(outcome, Failure):
            outcome = {"status": outcome.status, "detail": outcome.detail}
        yield paths[index], outcome


def _name(task: _Task) -> str:
    return str(task.path)


def _probe(task: _Task) -> Facts:
    from stm.datasets.probe import probe_file  # PyAV is imported only in the workers

    return probe_file(task.path, **task.settings)
