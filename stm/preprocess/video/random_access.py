"""Random access to the frames of source videos by index, for features of whole videos. Training never reads videos.

`pyav` decodes from the start and is correct on every file tested. `pyav-seek` decodes only what is needed, from key frames
before it, in containers whose index is reliable; of other files it reads all. It compares the times of the frames with those
listed in the container, and does not notice damage elsewhere. `decord` (the maintained `decord2`) seeks, and is
rejected for files on which it silently returned wrong frames: those whose edit list hides frames (it counts them and
repeats the last frame), MPEG transport and program streams (index 0 returned frame 225), and files whose pixels are not
square or that have a crop or several video streams (it ignores all three). Nor is it used where it counts other frames than
the container has. On a busy machine it gives up seeking and returns a frame before the right one, with no more than a line in
its log, which is therefore read.
"""

import os
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Literal

import av
import cv2
import numpy as np
from numpy.typing import NDArray

from stm.datasets.media import is_from_machine
from stm.jobs.status import Status
from stm.preprocess.clip_outcomes import Note
from stm.preprocess.frames.extract import stored_size
from stm.preprocess.video.container import VideoError, choose_stream, open_container, plain_error
from stm.preprocess.video.problems import EPSILON
from stm.preprocess.video.reader import Video
from stm.preprocess.video.resize import Resizer
from stm.preprocess.video.timestamps import JoinedStreams

Backend = Literal["pyav", "pyav-seek", "decord"]
_DECORD_WRONG = ("mpegts", "mpegtsraw", "mpeg", "mpegvideo", "h264", "hevc", "m4v")
_MAX_SIDE = 16384  # pixels, of a resized frame
_LONGEST_GAP = 64  # frames that are not needed and decoded all the same rather than seeking behind them
_DECORD_GIVES_UP = b"Failed to skip frames"
_DECORD_ATTEMPTS = 3
_DECORD_BATCH = 8  # frames of full size in memory at a time


@dataclass(frozen=True)
class ReadFrame:
    """A frame as displayed."""

    index: int  # in display order, 0 for the clip's first frame
    seconds: float  # since the start of the file
    image: NDArray[np.uint8]  # [height, width, 3], RGB


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
    clip, last = ClipReader(path, backend=backend), max(indices, default=-1)
    images = {frame.index: frame.image for frame in clip.read(set(indices), to_end=False)}
    if clip.size_change:
        raise VideoError(Status.SIZE_CHANGES, f"{path}: {clip.size_change}")
    if last >= clip.decoded:
        raise IndexError(f"{path}: has {clip.decoded} frames; asked for frame {last}")
    return np.stack([images[index] for index in indices]) if indices else np.empty((0, 0, 0, 3), np.uint8)


class ClipReader:
    """Reads chosen frames of a video, or of a part of it, in one pass.

    Args:
        path: the video.
        start, end: bounds of the part in seconds, start <= time < end; None: those of the file.
        short_side: side to which the frames' short side is resized, in pixels; None: frames of their own size, whose pixels
            are those of the ffmpeg program.
        backend: the decoding library.

    Attributes:
        seconds: the time of each frame of the clip that was decoded, in s since the start of the file.
        damaged: indices of frames that the decoder marked as damaged. Yielded only at their own size; decord does not tell.
        size_change: where the shape of the frames changes, which ends reading; empty if it does not.
        notes: problems of the file that reading has shown, most severe first.
    """

    def __init__(
        self,
        path: Path,
        start: float | None = None,
        end: float | None = None,
        *,
        short_side: int | None = None,
        backend: Backend = "pyav",
    ) -> None:
        self.path = path
        self.start = start
        self.end = end
        self.short_side = short_side
        self.backend = backend
        self.seconds: list[float] = []
        self.damaged: set[int] = set()
        self.size_change = ""
        self.notes: list[Note] = []
        self._resize = Resizer() if short_side else Resizer(flags="")

    @property
    def decoded(self) -> int:
        """Number of frames of the clip that were decoded."""
        return len(self.seconds)

    def read(self, indices: Collection[int], *, to_end: bool = True) -> Iterator[ReadFrame]:
        """Yield the frames with these indices, ascending.

        Args:
            to_end: whether to decode the clip to its end, so that `seconds`, `damaged` and `notes` are complete; otherwise up
                to the last of `indices`.

        Raises:
            VideoError: the file cannot be read, or the backend would return wrong frames.
        """
        self.seconds.clear()
        self.damaged.clear()
        if self.backend == "decord":
            yield from self._read_decord(indices)
        elif self.backend == "pyav-seek":
            yield from self._read_seeking(indices)
        else:
            yield from self._read_pyav(indices, to_end)

    def _read_seeking(self, indices: Collection[int]) -> Iterator[ReadFrame]:
        seconds = list_times(self.path, self.start, self.end)
        wanted = sorted(index for index in indices if index < len(seconds))
        if not wanted or not self._seeks(seconds[wanted[-1]]):
            yield from self._read_pyav(indices, True)
            return
        runs = np.split(wanted, np.flatnonzero(np.diff(wanted) > _LONGEST_GAP) + 1)
        for run in runs:
            first, last = int(run[0]), int(run[-1])
            end = seconds[last + 1] if last + 1 < len(seconds) else self.end
            part = ClipReader(self.path, seconds[first], end, short_side=self.short_side)
            for frame in part.read((run - first).tolist()):
                if abs(frame.seconds - seconds[first + frame.index]) > EPSILON:
                    break
                yield ReadFrame(first + frame.index, frame.seconds, frame.image)
            if part.decoded != last + 1 - first:
                detail = f"other frames than its container lists from {seconds[first]:.3f} s; use the backend `pyav`"
                raise VideoError(Status.CORRUPT_FRAMES, detail)
            self.damaged |= {first + index for index in part.damaged}
            self.size_change = self.size_change or part.size_change
        self.seconds.extend(seconds)
        if self.damaged:
            self.notes = [Note(Status.CORRUPT_FRAMES, f"{len(self.damaged)} frames are marked damaged")]

    def _seeks(self, seconds: float) -> bool:
        """Whether frames at a time are found by seeking."""
        with Video(self.path, seconds) as video:
            return video.seeks()

    def _read_pyav(self, indices: Collection[int], to_end: bool) -> Iterator[ReadFrame]:
        last, size, shape = max(indices, default=-1), (0, 0), ""
        with Video(self.path, self.start, self.end) as video:
            for frame in video.frames():
                if (now := video.describe_size(frame.image)) != shape:
                    shown = self._size(*video.shown_size(frame.image))
                    if frame.index and shown != size:
                        self.size_change = f"the frame size changes at {frame.seconds:.3f} s from {shape} to {now}"
                        break
                    size, shape = shown, now
                self.seconds.append(frame.seconds)
                if frame.corrupt and self.short_side:
                    self.damaged.add(frame.index)
                elif frame.index in indices:
                    # Resized before rotating: swscale works on the coded orientation.
                    image = self._resize(frame.image, *video.orientation.size(*size))
                    yield ReadFrame(frame.index, frame.seconds, np.asarray(video.orientation.turn(image), np.uint8))
                if not to_end and frame.index >= last:
                    break
            self.notes = video.notes

    def _size(self, width: int, height: int) -> tuple[int, int]:
        if not self.short_side:
            return width, height
        size = stored_size(width, height, self.short_side)
        if max(size) > _MAX_SIDE:
            raise VideoError(Status.OPEN_FAILED, f"resized frames would be {size[0]} x {size[1]} pixels")
        return size

    def _read_decord(self, indices: Collection[int]) -> Iterator[ReadFrame]:
        with Video(self.path) as video:
            first = next(video.frames(), None)  # only now the shape of the pixels is known
            if reason := _decord_mistake(video):
                status = Status.EDIT_LIST if video.hidden else Status.OPEN_FAILED
                raise VideoError(status, f"{reason}; use the backend `pyav`")
        reader, seconds = _open_decord(self.path), list_times(self.path)
        if len(reader) != len(seconds):
            detail = f"decord counts {len(reader)} frames, and the container has {len(seconds)}"
            raise VideoError(Status.OPEN_FAILED, f"{detail}; use the backend `pyav`")
        if first and seconds and abs(first.seconds - seconds[0]) > EPSILON:  # as in AVI files with B-frames
            detail = f"its container lists {seconds[0]:.3f} s for a first frame at {first.seconds:.3f} s"
            raise VideoError(Status.OPEN_FAILED, f"{detail}; use the backend `pyav`")
        inside = [number for number, time in enumerate(seconds) if _is_inside(time, self.start, self.end)]
        self.seconds.extend(seconds[number] for number in inside)
        numbers = sorted(index for index in indices if index < len(inside))
        for at in range(0, len(numbers), _DECORD_BATCH):
            batch = numbers[at : at + _DECORD_BATCH]
            for index, image in zip(batch, _decode_decord(self.path, reader, [inside[n] for n in batch]), strict=True):
                yield ReadFrame(index, self.seconds[index], self._shrink(image))

    def _shrink(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        if not self.short_side:
            return image
        height, width = image.shape[:2]
        size = self._size(width, height)
        # Not by swscale, which would halve the colours' resolution on the way from RGB to RGB.
        kind = cv2.INTER_AREA if size[0] * size[1] < width * height else cv2.INTER_CUBIC
        return np.asarray(cv2.resize(image, size, interpolation=kind), np.uint8)


def _is_inside(seconds: float, start: float | None, end: float | None) -> bool:
    return (start is None or seconds >= start - EPSILON) and (end is None or seconds < end - EPSILON)


def list_times(path: Path, start: float | None = None, end: float | None = None) -> list[float]:
    """Return the times of a clip's frames as the container lists them, without decoding; in s, ascending.

    They are those of the decoded frames in a healthy file; only decoding tells whether it is one.

    Raises:
        VideoError: the file cannot be opened, or has no video stream.
        OSError: the disk or the network fails.
    """
    times = []
    with open_container(path) as container:
        stream = choose_stream(container)
        joined, first = JoinedStreams(container, stream), (container.start_time or 0) / av.time_base
        try:
            for packet in container.demux(stream):
                if not packet.size or packet.is_discard:
                    continue
                joined.correct(packet)
                ticks = packet.pts if packet.pts is not None else packet.dts
                times.append(0.0 if ticks is None else float(ticks * stream.time_base) - first)
        except av.error.FFmpegError as error:  # a file that is cut off: what could be read is listed
            if is_from_machine(error):
                raise
    return [time for time in sorted(times) if _is_inside(time, start, end)]


def _decord_mistake(video: Video) -> str:
    """Return why decord would silently return wrong frames of a file; empty if it would not."""
    if video.hidden:
        return f"its edit list hides {video.hidden} frames, which decord would show"
    if video.container in _DECORD_WRONG:
        return f"decord returns wrong frames in {video.container} streams"
    if video.pixel_aspect != 1 or any((*video.cropping, *video.origin)):
        return "decord ignores the shape of its pixels and its crop"
    return "decord may choose another of its video streams" if video.streams > 1 else ""


def _open_decord(path: Path) -> Any:
    import decord

    try:
        return decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=1)
    except (RuntimeError, decord.DECORDError) as error:
        detail = f"decord cannot read it ({plain_error(error)}); use the backend `pyav`"
        raise VideoError(Status.OPEN_FAILED, detail) from error


def _decode_decord(path: Path, reader: Any, numbers: Sequence[int]) -> NDArray[np.uint8]:
    import decord

    for _ in range(_DECORD_ATTEMPTS):
        try:
            with _read_log() as log:
                images = np.asarray(reader.get_batch(list(numbers)).asnumpy(), np.uint8)
        except (RuntimeError, decord.DECORDError) as error:
            detail = f"decord cannot decode it ({plain_error(error)}); use the backend `pyav`"
            raise VideoError(Status.CORRUPT_FRAMES, detail) from error
        if not any(_DECORD_GIVES_UP in text for text in log):
            return images
        reader = _open_decord(path)
    detail = f"decord gave up seeking to frame {min(numbers)} {_DECORD_ATTEMPTS} times"
    raise VideoError(Status.OPEN_FAILED, f"{detail}; use the backend `pyav` or `pyav-seek`")


@contextmanager
def _read_log() -> Iterator[list[bytes]]:
    """Collect what native code writes to standard error meanwhile; all else of it is written there afterwards."""
    log: list[bytes] = []
    sys.stderr.flush()
    with TemporaryFile() as file:
        original = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield log
        finally:
            os.dup2(original, 2)
            os.close(original)
            file.seek(0)
            log.append(file.read())
            if log[0] and _DECORD_GIVES_UP not in log[0]:
                os.write(2, log[0])
