"""Pixels of a crop: cut, resized, mirrored, changed."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from stm.data.crop_boxes import Box

Picture = NDArray[np.uint8]
Decoded = Iterable[tuple[int, Picture]]  # positions and frames, of all windows together


class Cut(NamedTuple):
    """What is done to every frame of a sample."""

    box: Box
    flip: bool = False
    change: Callable[[Picture], Picture] | None = None  # of a picture [size, size, 3], after crop, size and flip

    def write(self, frame: Picture, place: NDArray[np.uint8]) -> None:
        """Cuts a frame [height, width, 3] and writes it to `place`, uint8 [3, size, size], contiguous."""
        box, size = self.box, place.shape[-1]
        part = frame[box.top : box.top + box.height, box.left : box.left + box.width]
        # Area averaging when it shrinks avoids aliasing; when it enlarges, it would be nearest neighbour.
        shrinks = box.width >= size and box.height >= size
        interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
        picture: NDArray[Any] = cv2.resize(part, (size, size), interpolation=interpolation)
        if self.flip:
            picture = cv2.flip(picture, 1)
        if self.change is not None:
            picture = self.change(picture)
        # Into the three planes of `place`; several times as fast as a transposed copy.
        cv2.split(picture, list(place))

    def copy(self, frame: Picture, place: NDArray[np.uint8]) -> None:
        """Cuts a frame and does nothing else to it; `place` is uint8 [box.height, box.width, 3]."""
        box = self.box
        place[...] = frame[box.top : box.top + box.height, box.left : box.left + box.width]


def cut_frames(frames: list[Picture], box: Box, size: int, flip: bool) -> NDArray[np.uint8]:
    """Crops frames [height, width, 3], resizes and mirrors them -> uint8 [T, 3, size, size]."""
    video = np.empty((len(frames), 3, size, size), dtype=np.uint8)
    for frame, place in zip(frames, video, strict=True):
        Cut(box, flip).write(frame, place)
    return video


def cut_clip(
    frames: Decoded, windows: Sequence[NDArray[np.int64]], cuts: Sequence[Cut], size: int
) -> NDArray[np.uint8]:
    """Cuts the windows of several samples from frames that pass by once -> uint8 [samples, T, 3, size, size].

    Args:
        windows: the positions of each sample's frames, of one length.
        cuts: what is done to each sample's frames.
    """
    video = np.empty((len(windows), len(windows[0]), 3, size, size), dtype=np.uint8)
    _pass_by(frames, windows, [cut.write for cut in cuts], video)
    return video


def copy_clip(frames: Decoded, windows: Sequence[NDArray[np.int64]], cuts: Sequence[Cut]) -> list[NDArray[np.uint8]]:
    """`cut_clip` without resizing, mirroring and change -> uint8 [T, box.height, box.width, 3] of each sample."""
    shapes = [(len(window), cut.box.height, cut.box.width, 3) for window, cut in zip(windows, cuts, strict=True)]
    crops = [np.empty(shape, dtype=np.uint8) for shape in shapes]
    _pass_by(frames, windows, [cut.copy for cut in cuts], crops)
    return crops


def _pass_by(
    frames: Decoded,
    windows: Sequence[NDArray[np.int64]],
    writers: Sequence[Callable[[Picture, NDArray[np.uint8]], None]],
    videos: Sequence[NDArray[np.uint8]] | NDArray[np.uint8],
) -> None:
    """Lets each sample's writer write the frames of its window into its video, [T, ...]."""
    takers: dict[int, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))  # position -> sample -> its slots
    for sample, window in enumerate(windows):
        for slot, position in enumerate(window.tolist()):
            takers[position][sample].append(slot)
    for position, frame in frames:
        for sample, (first, *others) in takers[position].items():
            video = videos[sample]
            writers[sample](frame, video[first])
            video[others] = video[first]  # a short clip takes its last frame several times
