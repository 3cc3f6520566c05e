"""Random access to frames of source videos by index, for evaluation on original videos. Training never reads videos.

`pyav` decodes from the start and is correct on every file tested. `decord` (the maintained `decord2`) seeks, and is
rejected for files on which it silently returned wrong frames: those whose edit list hides frames (it counts them and
repeats the last frame), MPEG transport and program streams (index 0 returned frame 225), and files whose pixels are not
square or that have a crop or several video streams (it ignores all three).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from stm.jobs.status import Status
from stm.preprocess.video.container import VideoError
from stm.preprocess.video.reader import Video
from stm.preprocess.video.resize import Resizer

Backend = Literal["pyav", "decord"]
_DECORD_WRONG = ("mpegts", "mpegtsraw", "mpeg", "mpegvideo", "h264", "hevc", "m4v")


def read_clip(path: Path, indices: Sequence[int], backend: Backend = "pyav") -> NDArray[np.uint8]:
    """Read frames as displayed, in the order of `indices`, which may contain duplicates.

    Args:
        path: the video.
        indices: frame indices in display order, from 0.
        backend: the decoding library.

    Returns:
        uint8 [T, height, width, 3], RGB.

    Raises:
        VideoError: the file cannot be read, the shape of its frames changes, or the backend would return wrong frames.
        IndexError: an index is negative or beyond the last frame.
    """
    if min(indices, default=0) < 0:
        raise IndexError(f"{path}: frames are numbered from 0; asked for {min(indices)}")
    return _READERS[backend](path, indices)


def _read_pyav(path: Path, indices: Sequence[int]) -> NDArray[np.uint8]:
    requested, last = set(indices), max(indices, default=-1)
    images: dict[int, NDArray[np.uint8]] = {}
    resize = Resizer(flags="")  # no extra flags, so that pixels match those of other readers
    with Video(path) as video:
        for frame in video.frames():
            if frame.index in requested:
                size = video.orientation.size(*video.shown_size(frame.image))  # back to the coded orientation
                image = resize(frame.image, *size)
                images[frame.index] = np.asarray(video.orientation.turn(image), np.uint8)
            if frame.index >= last:
                break
        decoded = video.decoded
    if last >= decoded:
        raise IndexError(f"{path}: has {decoded} frames; asked for frame {last}")
    if len({image.shape for image in images.values()}) > 1:
        raise VideoError(Status.SIZE_CHANGES, f"{path}: the frame size changes within the file")
    return np.stack([images[index] for index in indices]) if indices else np.empty((0, 0, 0, 3), np.uint8)


def _read_decord(path: Path, indices: Sequence[int]) -> NDArray[np.uint8]:
    with Video(path) as video:
        next(video.frames(), None)  # the shape of the pixels is known after the first frame
        reason = _decord_mistake(video)
    if not reason:
        return _seek_decord(path, indices)
    status = Status.EDIT_LIST if video.hidden else Status.OPEN_FAILED
    raise VideoError(status, f"{path}: {reason}; use the backend `pyav`")


def _decord_mistake(video: Video) -> str:
    """Return why decord would silently return wrong frames of a file; empty if it would not."""
    if video.hidden:
        return f"its edit list hides {video.hidden} frames, which decord would show"
    if video.container in _DECORD_WRONG:
        return f"decord returns wrong frames in {video.container} streams"
    if video.pixel_aspect != 1 or any(video.cropping):
        return "decord ignores the shape of its pixels and its crop"
    return "decord may choose another of its video streams" if video.streams > 1 else ""


def _seek_decord(path: Path, indices: Sequence[int]) -> NDArray[np.uint8]:
    import decord

    try:
        reader = decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=1)
    except (RuntimeError, decord.DECORDError) as error:
        raise VideoError(Status.OPEN_FAILED, f"{path}: decord cannot read it ({error})") from error
    if max(indices, default=-1) >= len(reader):
        raise IndexError(f"{path}: has {len(reader)} frames; asked for frame {max(indices)}")
    return np.asarray(reader.get_batch(list(indices)).asnumpy(), np.uint8)


_READERS = {"pyav": _read_pyav, "decord": _read_decord}
