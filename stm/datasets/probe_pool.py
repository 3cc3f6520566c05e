"""Looks at many video files in worker processes, so that a file that hangs or crashes a decoder costs one file."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stm.jobs.workers import Failure, run_isolated

Facts = dict[str, Any]  # as `stm.datasets.probe.probe_file` returns them


@dataclass(frozen=True)
class _Look:
    path: Path
    settings: Mapping[str, int]


def probe_files(
    paths: Sequence[Path], settings: Mapping[str, int], processes: int, timeout: float
) -> Iterator[tuple[Path, Facts]]:
    """Looks at many files in worker processes; yields (path, facts) in the order in which they finish.

    Args:
        settings: `min_side` and `max_side` of `probe_file`.
        timeout: seconds for one file.
    """
    looks = [_Look(path, settings) for path in paths]
    for index, outcome in run_isolated(_probe, looks, processes, timeout):
        if isinstance(outcome, Failure):
            outcome = {"status": outcome.status, "detail": outcome.detail}
        yield paths[index], outcome


def _probe(look: _Look) -> Facts:
    from stm.datasets.probe import probe_file  # PyAV is loaded in the workers only

    return probe_file(look.path, **look.settings)
