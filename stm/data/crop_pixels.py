"""Pixels of a crop: cropped, resized, mirrored and augmented."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from stm.config import Interpolation
from stm.data.crop_boxes import Box

Frame = NDArray[np.uint8]
Allocate = Callable[[tuple[int, ...]], NDArray[np.uint8]]  # returns memory for pixels of a shape, not initialised
Decoded = Iterable[tuple[int, Frame]]  # (position, frame) pairs of all windows together


def allocate_pixels(shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Memory of its own for the pixels of some samples."""
    return np.empty(shape, dtype=np.uint8)


class FrameTransform(NamedTuple):
    """The transform that is applied to every frame of a sample."""

    box: Box
    flip: bool = False
    change: Callable[[Frame], Frame] | None = None  # applied to the frame [size, size, 3] after crop, resize and flip
    interpolation: Interpolation = "area"

    def write(self, frame: Frame, place: NDArray[np.uint8]) -> None:
        """Transform a frame [height, width, 3] and write it to `place`, uint8 [3, size, size], contiguous."""
        box, size = self.box, place.shape[-1]
        part = frame[box.top : box.top + box.height, box.left : box.left + box.width]
        resized: NDArray[Any] = cv2.resize(part, (size, size), interpolation=self._method(size))
        if self.flip:
            resized = cv2.flip(resized, 1)
        if self.change is not None:
            resized = self.change(resized)
        # Writes straight into the three planes of `place`, which is several times faster than a transposed copy.
        cv2.split(resized, list(place))

    def _method(self, size: int) -> int:
        """OpenCV's interpolation for this box."""
        if self.interpolation == "bicubic":
            return cv2.INTER_CUBIC
        # Area averaging avoids aliasing when shrinking; when enlarging, OpenCV's INTER_AREA would be nearest neighbour.
        shrinks = self.box.width >= size and self.box.height >= size
        return cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR

    def copy(self, frame: Frame, place: NDArray[np.uint8]) -> None:
        """Only crop a frame and copy it to `place`, uint8 [box.height, box.width, 3]."""
        box = self.box
        place[...] = frame[box.top : box.top + box.height, box.left : box.left + box.width]


def cut_frames(frames: list[Frame], box: Box, size: int, flip: bool) -> NDArray[np.uint8]:
    """Crop, resize and optionally mirror frames [height, width, 3] -> uint8 [T, 3, size, size]."""
    video = np.empty((len(frames), 3, size, size), dtype=np.uint8)
    for frame, place in zip(frames, video, strict=True):
        FrameTransform(box, flip).write(frame, place)
    return video


def cut_clip(
    frames: Decoded,
    windows: Sequence[NDArray[np.int64]],
    cuts: Sequence[FrameTransform],
    videos: NDArray[np.uint8],
) -> None:
    """Cut the windows of several samples from frames that are decoded once.

    Args:
        windows: the positions of each sample's frames, all of the same length.
        cuts: the transform of each sample's frames.
        videos: where to write them, uint8 [samples, T, 3, size, size].
    """
    _write_windows(frames, windows, [cut.write for cut in cuts], videos)


def copy_clip(
    frames: Decoded, windows: Sequence[NDArray[np.int64]], cuts: Sequence[FrameTransform]
) -> list[NDArray[np.uint8]]:
    """Like `cut_clip`, but only crop -> uint8 [T, box.height, box.width, 3] per sample."""
    shapes = [(len(window), cut.box.height, cut.box.width, 3) for window, cut in zip(windows, cuts, strict=True)]
    crops = [np.empty(shape, dtype=np.uint8) for shape in shapes]
    _write_windows(frames, windows, [cut.copy for cut in cuts], crops)
    return crops


def _write_windows(
    frames: Decoded,
    windows: Sequence[NDArray[np.int64]],
    writers: Sequence[Callable[[Frame, NDArray[np.uint8]], None]],
    videos: Sequence[NDArray[np.uint8]] | NDArray[np.uint8],
) -> None:
    """Write the frames of each sample's window into its video, [T, ...], with the sample's own writer."""
    # position -> sample -> indices in the sample's video
    takers: dict[int, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for sample, window in enumerate(windows):
        for place, position in enumerate(window.tolist()):
            takers[position][sample].append(place)
    for position, frame in frames:
        for sample, (first, *others) in takers[position].items():
            video = videos[sample]
            writers[sample](frame, video[first])
            if others:  # a short clip repeats its last frame
                video[others] = video[first]
