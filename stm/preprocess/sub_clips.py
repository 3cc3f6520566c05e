"""Sub-clips of one long file, read in one pass where each alone would be decoded from the beginning of the file.

Transport streams, AVI, FLV and files with hidden frames cannot be sought exactly. Reading each of their sub-clips alone
takes time proportional to the number of clips times their position.
"""

import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from stm.jobs.progress import Progress
from stm.jobs.workers import run_isolated
from stm.manifest import check_unchanged
from stm.preprocess.video.container import VideoError
from stm.preprocess.video.reader import Video
from stm.storage.files import UnsafePathError, safe_join


class ClipTask(Protocol):
    """The work on one clip of a video."""

    @property
    def row(self) -> Mapping[str, Any]:
        """The clip's row of the manifest."""

    @property
    def root(self) -> Path:
        """The dataset's folder."""


TaskT = TypeVar("TaskT", bound=ClipTask)


def run_sequences(
    title: str,
    function: Callable[[Sequence[TaskT]], None],
    tasks: Sequence[TaskT],
    processes: int,
    timeout_seconds: float,
) -> None:
    """Run `function` in worker processes on sequences of clips of one file.

    Failures are not reported: what a sequence leaves undone is to be done clip by clip.

    Args:
        title: label of the progress line.
        function: processes the clips of a sequence, in order, with `read_sequence`.
        tasks: the clips that are not finished.
        timeout_seconds: deadline per clip.
    """
    sequences = find_sequences(tasks)
    if not sequences:
        return
    longest = max(map(len, sequences))
    with Progress(title, total=len(sequences), unit="sequences of clips") as progress:
        for _ in run_isolated(function, sequences, processes, timeout_seconds * longest, _name, retry=False):
            progress.advance()


def _name(tasks: Sequence[TaskT]) -> str:
    return f"the clips of {tasks[0].row['path']}"


def find_sequences(tasks: Sequence[TaskT]) -> list[list[TaskT]]:
    """Divide the clips of each file into as few sequences as possible, in order of time and without overlap.

    Overlapping clips are in different sequences, so that only one clip's frames are in memory at a time. Clips without
    a sequence of at least two are left out.
    """
    by_file: dict[str, list[list[TaskT]]] = {}
    for task in sorted(tasks, key=lambda task: (task.row["path"], *_interval(task))):
        sequences = by_file.setdefault(task.row["path"], [])
        start = _interval(task)[0]
        fitting = next((sequence for sequence in sequences if _interval(sequence[-1])[1] <= start), None)
        if fitting is None:
            sequences.append([task])
        else:
            fitting.append(task)
    return [sequence for sequences in by_file.values() for sequence in sequences if len(sequence) > 1]


def _interval(task: ClipTask) -> tuple[float, float]:
    start, end = task.row["start"], task.row["end"]
    return start or 0.0, float("inf") if end is None else end


def read_sequence(tasks: Sequence[TaskT], timeout_seconds: float, **options: Any) -> Iterator[tuple[TaskT, Video]]:
    """Yield each clip with its video, to be read by `Video.frames`; in a worker process that processes this sequence.

    Yields nothing if seeking is exact, and ends early at a problem of the file: each clip alone then finds its own.

    Args:
        timeout_seconds: deadline per clip, after which the process is ended by SIGALRM.
        options: further arguments of `Video`.
    """
    first, last = tasks[0].row, tasks[-1].row
    try:
        path = safe_join(tasks[0].root, first["path"])
        check_unchanged(path, first)
        with Video(path, last["start"], last["end"], **options) as video:
            if video.seeks():
                return
        with Video(path, first["start"], first["end"], whole=True, **options) as video:
            for task in tasks:
                signal.setitimer(signal.ITIMER_REAL, timeout_seconds)
                if task is tasks[0] or video.continue_with(task.row["start"], task.row["end"]):
                    yield task, video
    except (UnsafePathError, VideoError):
        return
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
