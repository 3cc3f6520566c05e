"""Reading a video in order: every frame that a player would show, with its time, and what was wrong with the file.

Frames are counted as they come out of the decoder and carry their time stamp; the container's word on how many there
are, or at which rate, is never trusted. PyAV decodes on one thread: the stages run one clip per core.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import av

from stm.datasets.probe import is_image
from stm.jobs.status import Status
from stm.preprocess.clip_outcomes import Note
from stm.preprocess.video.container import VideoError, choose_stream, hidden_frames, open_container, plain_error
from stm.preprocess.video.orientation import Orientation
from stm.preprocess.video.problems import Watch

# Containers whose index leads to a key frame at or before any time. Others are read from their beginning.
_SEEKABLE = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")
_EPSILON = 1e-6  # s; time stamps are rounded to the container's time base


@dataclass(frozen=True)
class DecodedFrame:
    """One frame out of the decoder, not turned yet."""

    index: int  # decode order within the clip, 0 is the first frame at or after `start`; -1: not of the clip
    seconds: float  # since the start of the file, as a player counts
    picture: av.VideoFrame

    @property
    def corrupt(self) -> bool:
        """Whether the decoder marked it as damaged: lost data, or built upon a damaged frame."""
        return bool(self.picture.is_corrupt)


class Video:
    """One clip of a video file, open for reading once, in order.

    >>> with Video(Path("a.mp4"), start=2.0, end=4.0) as video:   # doctest: +SKIP
    ...     for frame in video.frames():
    ...         frame.picture.to_ndarray(format="rgb24")
    ...     print(video.notes)

    Args:
        path: the file.
        start, end: the clip in seconds, start <= time < end; None: from the beginning, to the end.
        vectors: ask the decoder to export its motion vectors with each frame, whose pixels it may then leave half decoded.
        max_side: a picture with a longer side is refused before it is decoded, in pixels.

    Raises:
        VideoError: missing, empty, no known container, no video stream, or absurdly large.
    """

    def __init__(
        self,
        path: Path,
        start: float | None = None,
        end: float | None = None,
        *,
        vectors: bool = False,
        max_side: int = 16384,
    ) -> None:
        self.path, self.start, self.end = path, start, end
        self._vectors, self._max_side = vectors, max_side
        self.orientation = Orientation()  # known once the first frame is out
        self._open()

    def _open(self) -> None:
        """Opens the file; also after a seek that missed, a decoder half fed is not worth repairing."""
        self._container = open_container(self.path)
        try:
            self._stream = choose_stream(self._container)
            self._configure(self._stream.codec_context)
        except BaseException:
            self._container.close()
            raise
        self._watch = Watch(hidden_frames(self._stream))

    def _configure(self, context: Any) -> None:
        if max(context.width, context.height) > self._max_side:
            size = f"{context.width} x {context.height}"
            raise VideoError(Status.OPEN_FAILED, f"{size} pixels: a side is longer than {self._max_side}")
        context.thread_type = "NONE"
        context.thread_count = 1
        # The size may change inside the stream; the decoder itself then refuses what is too large.
        options = {"max_pixels": str(self._max_side**2)}
        if self._vectors:
            # They are in the stream as they are; the pictures are not looked at, so that they need not be right.
            options |= {"flags2": "+export_mvs", "skip_loop_filter": "all", "skip_idct": "all"}
        # A video that is cut off still has good frames. A picture has none: ffmpeg would fill what is missing with grey.
        options |= {"err_detect": "explode"} if is_image(self._container) else {}
        context.options = options

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._container.close()

    @property
    def codec(self) -> str:
        """ffmpeg's name of the coding: `h264`, `vp9`, ..."""
        return str(self._stream.codec_context.codec.canonical_name)

    @property
    def container(self) -> str:
        """ffmpeg's name of the container: `mpegts`, `mov,mp4,m4a,3gp,3g2,mj2`, ..."""
        return str(self._container.format.name)

    @property
    def stream(self) -> Any:
        """The PyAV stream, a template for filters."""
        return self._stream

    @property
    def hidden(self) -> int:
        """Coded frames that the container's edit list hides from the player; they are not decoded frames."""
        return self._watch.hidden

    @property
    def decoded(self) -> int:
        """Frames of the clip so far."""
        return len(self._watch.times)

    @property
    def notes(self) -> list[Note]:
        """What was noticed so far, gravest first."""
        return self._watch.notes(self._stream, self.start, self.end)

    def frames(self, *, surroundings: bool = False) -> Iterator[DecodedFrame]:
        """Yields the clip's frames in order; afterwards `notes` says what was wrong.

        Args:
            surroundings: also yield what the decoder gives before and after the clip, with index -1.
        """
        for number, (picture, seconds) in enumerate(self._timed()):
            if number == 0:
                still = is_image(self._container)
                self.orientation = Orientation.of_picture(self.path) if still else Orientation.of(picture)
            if self.end is not None and seconds >= self.end - _EPSILON:
                if not surroundings:
                    return
                yield DecodedFrame(-1, seconds, picture)
            elif self.start is None or seconds >= self.start - _EPSILON:
                self._watch.record(seconds, picture.is_corrupt)
                yield DecodedFrame(self.decoded - 1, seconds, picture)
            elif surroundings:
                yield DecodedFrame(-1, seconds, picture)
        self._watch.complete = True

    def _timed(self) -> Iterator[tuple[av.VideoFrame, float]]:
        """Pictures with their times; a stream without time stamps is counted at its frame rate."""
        pictures = self._pictures()
        base, step = self._stream.time_base, 1.0 / float(self._stream.average_rate or 25)
        origin = (self._container.start_time or 0) / av.time_base
        seconds = -step
        for picture in pictures:
            stamp = picture.pts if picture.pts is not None else picture.dts
            seconds = float(stamp * base) - origin if stamp is not None else seconds + step
            yield picture, seconds

    def _pictures(self) -> Iterator[av.VideoFrame]:
        """Pictures from a key frame at or before the start, or from the beginning where none is certain."""
        if self.start and self.container in _SEEKABLE and not self._watch.hidden:
            pictures = self._seek(self.start)
            if pictures is not None:
                return pictures
            self._container.close()
            self._open()
        return self._decode()

    def _seek(self, start: float) -> Iterator[av.VideoFrame] | None:
        """Pictures after a seek; None when the first of them is not a sound key frame at or before `start`."""
        target = round(start * av.time_base) + (self._container.start_time or 0)
        try:
            self._container.seek(target)
        except av.error.FFmpegError:
            return None
        pictures = self._decode()
        first = next(pictures, None)
        if first is None or first.pts is None or first.is_corrupt or not first.key_frame:
            return None
        if float(first.pts * self._stream.time_base) > target / av.time_base + _EPSILON:
            return None
        return chain([first], pictures)

    def _decode(self) -> Iterator[av.VideoFrame]:
        """All pictures from where the container stands; a packet that cannot be decoded is counted and left out."""
        for packet in self._packets():
            try:
                yield from self._stream.codec_context.decode(packet)
            except av.error.EOFError:
                return
            except av.error.FFmpegError as error:
                stamp = packet.pts if packet is not None else None
                self._watch.broken.append(None if stamp is None else float(stamp * self._stream.time_base))
                self._watch.error = self._watch.error or plain_error(error)

    def _packets(self) -> Iterator[Any]:
        """Packets, then None, which makes the decoder give what it still holds: also after the file broke off."""
        try:
            for packet in self._container.demux(self._stream):
                if packet.size:
                    yield packet
        except av.error.FFmpegError as error:
            self._watch.error = plain_error(error)
        yield None


def decode(path: Path, start: float | None = None, end: float | None = None) -> Iterator[DecodedFrame]:
    """Yields the frames of a clip in order; see `Video` for its errors, and for what was wrong with the file."""
    with Video(path, start, end) as video:
        yield from video.frames()
