"""Which frames of a video each of its windows consists of.

Windows lie on a grid of every k-th frame, as packed shards store them, so that a video and its packed clip have the same
windows. Frames that the decoder marks as damaged are not on the grid.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stm.config import Sampling
from stm.data.sampling import spread_positions, view_windows

_EPSILON = 1e-6  # s; times are rounded to the container's time base


class Grid(NamedTuple):
    """The frames of a clip that windows may use, ascending."""

    indices: list[int]  # in display order, 0 for the clip's first frame
    seconds: list[float]  # since the start of the file

    @classmethod
    def every(cls, seconds: Sequence[float], every: int, damaged: frozenset[int] = frozenset()) -> "Grid":
        """Every `every`-th frame of a clip whose frames have these times, without damaged ones."""
        indices = [index for index in range(0, len(seconds), every) if index not in damaged]
        return cls(indices, [seconds[index] for index in indices])


@dataclass(frozen=True)
class WindowPlan:
    """How windows are placed: `count` spread over the clip, or sliding by `stride_seconds` or `stride_frames`.

    Sliding windows are those that lie in the clip as a whole. A clip that is shorter than a window has one, which repeats the
    clip's last frame, as VideoMAE's test does.
    """

    frames: int  # per window
    every: int = 4  # frames of the video from one of a window's frames to the next
    count: int = 1
    stride_seconds: float | None = None
    stride_frames: int | None = None  # frames of the video
    sampling: Sampling = "dense"

    @property
    def slides(self) -> bool:
        """Whether windows slide."""
        return self.stride_seconds is not None or self.stride_frames is not None

    def cut(self, grid: Grid) -> list[NDArray[np.int64]]:
        """Return the windows in the order of their starts, as positions in the grid, int64 [frames] each."""
        stored = len(grid.indices)
        if not stored:
            return []
        if not self.slides:
            return view_windows(self.count, self.frames, 1, stored, self.sampling)
        return [spread_positions(start, self.frames, 1, stored) for start in self._starts(grid)]

    def _starts(self, grid: Grid) -> list[int]:
        """Return the first position at or after each multiple of the stride, as far as a whole window fits."""
        last = max(0, len(grid.indices) - self.frames)
        if self.stride_seconds is not None:
            places = np.array(grid.seconds[: last + 1]) - grid.seconds[0] + _EPSILON
            due = places // self.stride_seconds
        else:
            due = np.array(grid.indices[: last + 1]) // (self.stride_frames or 1)
        return [0, *(np.flatnonzero(np.diff(due)) + 1).tolist()]
