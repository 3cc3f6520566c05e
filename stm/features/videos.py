"""Decodes the windows of one video in a worker process, in a single pass."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stm.config import BadInput
from stm.features.cutting import CropPlan, Pulse, Restart, Summary, Window, WindowCutter
from stm.features.windows import Grid, WindowPlan
from stm.jobs.status import Status
from stm.preprocess.clip_outcomes import Note, decide
from stm.preprocess.video.container import VideoError
from stm.preprocess.video.random_access import Backend, ClipReader, list_times

_PASSES = 3  # a file that is read differently each time is given up
# Deadlines are per part, and the first window of a long video may take hours of decoding: of a video of up to so many frames,
# every so manieth one says that decoding goes on.
_PULSE = 250
_LONGEST = 10_000_000

Part = Window | Pulse | Restart | Summary


@dataclass(frozen=True)
class VideoTask:
    """A video, or a part of it, and how it is read."""

    path: str
    start: float | None
    end: float | None
    windows: WindowPlan
    crops: CropPlan
    short_side: int  # pixels
    backend: Backend = "pyav"

    @property
    def name(self) -> str:
        """The file's name in error messages."""
        return self.path


def decode_video(task: VideoTask) -> Iterator[Part]:
    """Yield the windows of a video in order, then their summary.

    Where windows lie depends on the number of frames. It is taken from the container's list of packets, which takes no
    decoding; if decoding shows other frames, as in damaged files, the windows are void and the video is read again.
    """
    try:
        seconds = list_times(Path(task.path), task.start, task.end)
        grid = Grid.every(seconds, task.windows.every)
        for _ in range(_PASSES):
            clip = ClipReader(Path(task.path), task.start, task.end, short_side=task.short_side, backend=task.backend)
            yield from _decode(task, clip, grid)
            if clip.size_change:
                raise VideoError(Status.SIZE_CHANGES, clip.size_change)
            expected = task.windows.cut(grid)
            grid = Grid.every(clip.seconds, task.windows.every, frozenset(clip.damaged))
            windows = task.windows.cut(grid)
            if len(windows) == len(expected) and all(map(np.array_equal, windows, expected)) and windows:
                outcome = decide(clip.notes, BadInput(), usable=True)
                yield Summary.of(windows, grid, str(outcome.status), outcome.detail)
                return
            if not windows:
                raise VideoError(*_without_frames(clip))
            yield Restart()
        raise VideoError(Status.CORRUPT_FRAMES, f"it has other frames each time that it is read ({_PASSES} times)")
    except VideoError as error:
        yield Summary([], [], str(error.status), error.detail)


def _without_frames(clip: ClipReader) -> tuple[Status, str]:
    """Describe why a clip has no frames at all."""
    notes = [*clip.notes, Note(Status.TOO_SHORT, "")]
    interval = "" if clip.start is None else f" from {clip.start:g} s"
    interval += "" if clip.end is None else f" to {clip.end:g} s"
    reason = f" ({notes[0].detail})" if notes[0].detail else ""
    return notes[0].status, f"no frame{interval} can be decoded{reason}"


def _decode(task: VideoTask, clip: ClipReader, grid: Grid) -> Iterator[Window | Pulse]:
    cutter = WindowCutter(task.windows.cut(grid), task.crops)
    places = {grid.indices[position]: position for position in cutter.positions}
    # decord would have to seek to them.
    pulses = set(range(0, _LONGEST, _PULSE)) if task.backend == "pyav" else set()
    for frame in clip.read(pulses.union(places)):
        if frame.index in places:
            yield from cutter.add(places[frame.index], frame.image)
        else:
            yield Pulse()
