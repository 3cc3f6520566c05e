"""Cuts windows from the frames of a clip as they are decoded, with few frames in memory at a time."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from stm.config import Interpolation
from stm.data.crop_boxes import Box, side_crops, whole_frame
from stm.data.crop_pixels import FrameTransform
from stm.features.windows import Grid


@dataclass(frozen=True)
class CropPlan:
    """How frames are cropped and resized, as in evaluations on packed shards."""

    image_size: int  # S, pixels
    crops: int = 1  # 1: the centre; 3: along the long side
    whole: bool = False  # squash the whole frame instead
    interpolation: Interpolation = "area"

    def boxes(self, height: int, width: int) -> list[Box]:
        """Return the crops of a frame."""
        return [whole_frame(width, height)] if self.whole else side_crops(self.crops, width, height)


class Window(NamedTuple):
    """The pixels of a window."""

    number: int
    video: NDArray[np.uint8]  # [crops, T, 3, S, S]


class Pulse(NamedTuple):
    """Decoding goes on, although no window is complete."""


class Restart(NamedTuple):
    """The file has other frames than its container says: windows sent so far are void."""


class Summary(NamedTuple):
    """The end of an item: what its windows consist of, and its problems."""

    seconds: list[tuple[float, float]]  # times of the first and the last frame of each window
    frames: list[list[int]]  # indices of each window's frames
    status: str
    detail: str

    @classmethod
    def of(cls, windows: Sequence[NDArray[np.int64]], grid: Grid, status: str, detail: str) -> "Summary":
        """Describe windows on a grid of frames."""
        seconds = [(grid.seconds[window[0]], grid.seconds[window[-1]]) for window in windows]
        frames = [[grid.indices[position] for position in window.tolist()] for window in windows]
        return cls(seconds, frames, status, detail)


class WindowCutter:
    """Collects the frames of windows, each of which is returned and forgotten once it is complete.

    Args:
        windows: positions of each window's frames, ascending; the last positions must not decrease from window to window.
    """

    def __init__(self, windows: Sequence[NDArray[np.int64]], plan: CropPlan) -> None:
        self._plan = plan
        self._frames = len(windows[0]) if windows else 0
        self._takers: dict[int, dict[int, list[int]]] = defaultdict(dict)  # position -> window -> places
        for number, window in enumerate(windows):
            for place, position in enumerate(window.tolist()):
                self._takers[position].setdefault(number, []).append(place)
        self._missing = [len(set(window.tolist())) for window in windows]
        self._open: dict[int, NDArray[np.uint8]] = {}

    @property
    def positions(self) -> set[int]:
        """The positions that windows consist of."""
        return set(self._takers)

    def add(self, position: int, image: NDArray[Any]) -> Iterator[Window]:
        """Take the next frame, uint8 [height, width, 3]; yield the windows that are complete now, in order."""
        cuts = [
            FrameTransform(box, interpolation=self._plan.interpolation) for box in self._plan.boxes(*image.shape[:2])
        ]
        size = self._plan.image_size
        cropped = np.empty((len(cuts), 3, size, size), np.uint8)
        image = np.ascontiguousarray(image)
        for cut, place in zip(cuts, cropped, strict=True):
            cut.write(image, place)
        for number, places in self._takers[position].items():
            if number not in self._open:
                self._open[number] = np.empty((len(cuts), self._frames, 3, size, size), np.uint8)
            self._open[number][:, places] = cropped[:, None]
            self._missing[number] -= 1
            if not self._missing[number]:
                yield Window(number, self._open.pop(number))
