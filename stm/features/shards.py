"""Reads the windows of one packed clip in a worker process: the pixels that evaluations see."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from stm.features.cutting import CropPlan, Summary, Window, WindowCutter
from stm.features.windows import Grid, WindowPlan
from stm.jobs.status import Status
from stm.shards.index import Clip
from stm.shards.reader import ShardReader


@dataclass(frozen=True)
class ShardTask:
    """A packed clip, and how it is read."""

    clip: Clip
    seconds: tuple[float, ...]  # times of the stored frames
    windows: WindowPlan  # counts stored frames
    crops: CropPlan

    @property
    def name(self) -> str:
        """The clip's name in error messages."""
        return f"{self.clip.key} of {self.clip.tar}"


def read_packed(task: ShardTask) -> Iterator[Window | Summary]:
    """Yield the windows of a clip in order, then their summary; frames are counted as stored."""
    grid = Grid.every(task.seconds, task.windows.every)
    windows = task.windows.cut(grid)
    cutter = WindowCutter(windows, task.crops)
    places = {grid.indices[position]: position for position in cutter.positions}
    for stored, image in _reader().frames(task.clip, places):
        yield from cutter.add(places[stored], image)
    yield Summary.of(windows, grid, str(Status.OK), "")


@cache
def _reader() -> ShardReader:
    return ShardReader()  # its tars stay open from clip to clip
