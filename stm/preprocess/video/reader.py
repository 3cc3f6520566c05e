"""Sequential reading of a video: every frame that a player would show, with its timestamp, and the file's problems.

Frames are counted as the decoder outputs them, with their own timestamps, because the frame count and frame rate
reported by the container are often wrong. PyAV decodes on one thread, because the stages run one clip per core.
"""

import errno
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import av
from av.video.frame import PictureType

from stm.datasets.display import Cropping, PixelAspect, describe_size, read_cropping, shown_size
from stm.datasets.media import is_from_machine
from stm.datasets.probe import DECODER_OPTIONS, is_image
from stm.jobs.status import Status
from stm.preprocess.clip_outcomes import Note
from stm.preprocess.video.container import VideoError, choose_stream, hidden_frames, open_container, plain_error
from stm.preprocess.video.header_crop import read_origin
from stm.preprocess.video.orientation import Orientation
from stm.preprocess.video.problems import EPSILON, DecodeLog
from stm.preprocess.video.resize import Cropper
from stm.preprocess.video.timestamps import FrameTimes, JoinedStreams
from stm.preprocess.video.truncation import Progress, is_cut_off
from stm.preprocess.video.unread import UnreadParts

# Containers whose index reliably locates a key frame at or before any time. All others are read from the beginning.
_SEEKABLE = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")
# Maximum number of frames around a clip's end that are kept for the clip that follows. Pixels need one; motion vectors
# need those between the I- or P-frames on both sides, of which x264 codes at most 16 each.
_MAX_HELD = 40


@dataclass(frozen=True)
class DecodedFrame:
    """One decoded frame, in its coded orientation, without what the container crops."""

    index: int  # decode order within the clip, 0 for the first frame at or after `start`; -1: outside the clip
    seconds: float  # since the start of the file, as displayed by a player
    image: av.VideoFrame

    @property
    def corrupt(self) -> bool:
        """Whether the decoder marked the frame as damaged: data is missing, or a reference frame is damaged."""
        return bool(self.image.is_corrupt)


class _Shown(NamedTuple):
    """A frame as a player shows it, except for its rotation."""

    image: av.VideoFrame
    seconds: float
    pixel_aspect: Fraction


class Video:
    """One clip of a video file, open for a single sequential read; `continue_with` moves on to a later clip.

    >>> with Video(Path("a.mp4"), start=2.0, end=4.0) as video:   # doctest: +SKIP
    ...     for frame in video.frames():
    ...         frame.image.to_ndarray(format="rgb24")
    ...     print(video.notes)

    Args:
        path: the file.
        start, end: bounds of the clip in seconds, start <= time < end; None for the start or end of the file.
        vectors: whether to export the decoder's motion vectors; pixels may then be only partly decoded.
        max_side: maximum side length in pixels; larger videos are rejected before decoding.
        whole: whether to read from the beginning of the file even if seeking is possible.

    Raises:
        VideoError: the file is missing, empty, of an unknown format or too large, or has no video stream.
    """

    def __init__(
        self,
        path: Path,
        start: float | None = None,
        end: float | None = None,
        *,
        vectors: bool = False,
        max_side: int = 16384,
        whole: bool = False,
    ) -> None:
        self.path = path
        self.start = start
        self.end = end
        self._vectors = vectors
        self._max_side = max_side
        self._whole = whole
        self._source: Iterator[tuple[av.VideoFrame, float]] | None = None
        self._held: deque[_Shown] = deque()  # the last frames read, if `whole`: see `_hold`
        self._gone = False  # whether frames that the next clip may need are no longer held
        self._again: deque[_Shown] = deque()  # frames around the previous clip's end, to be read again
        self._orientation: Orientation | None = None
        self.pixel_aspect = Fraction(1)  # width / height of a pixel of the latest frame
        self._open()

    def _open(self) -> None:
        """Open the file, or reopen it after a failed seek, which leaves the decoder in an undefined state."""
        self._container = open_container(self.path)
        try:
            self._stream = choose_stream(self._container)
            self._configure(self._stream.codec_context)
            self._crop = Cropper(read_cropping(self._container, self._stream))
            self._aspect = None if is_image(self._container) else PixelAspect(self._stream)
        except BaseException:
            self._container.close()
            raise
        self._log = DecodeLog(hidden_frames(self._stream))
        self._last_packet: int | None = None  # the last known position of a packet in the file, in bytes
        self._unread = UnreadParts(self.path, self._container)
        self._sought = False

    def _configure(self, context: Any) -> None:
        if max(context.width, context.height) > self._max_side:
            size = f"{context.width} x {context.height}"
            raise VideoError(Status.OPEN_FAILED, f"{size} pixels: a side is longer than {self._max_side}")
        context.thread_type = "NONE"  # frame threads delay output, and there is already one process per core
        context.thread_count = 1
        # The frame size may change within the stream, so the decoder must check it as well.
        options = {"max_pixels": str(self._max_side**2), **DECODER_OPTIONS}
        if self._vectors:
            # Vectors are coded in the stream; pixels are not used, so steps that affect only pixels are skipped.
            options |= {"flags2": "+export_mvs", "skip_loop_filter": "all", "skip_idct": "all"}
        # A truncated video still has intact frames. A truncated image has none: ffmpeg would fill the rest with grey.
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
        """ffmpeg's name for the codec: `h264`, `vp9`, ..."""
        return str(self._stream.codec_context.codec.canonical_name)

    @property
    def container(self) -> str:
        """ffmpeg's name for the container: `mpegts`, `mov,mp4,m4a,3gp,3g2,mj2`, ..."""
        return str(self._container.format.name)

    @property
    def streams(self) -> int:
        """The number of video streams, including cover images; one of them is read."""
        return len(self._container.streams.video)

    @property
    def cropping(self) -> Cropping:
        """The pixels at each side of the coded frames that the container hides; they are cut off."""
        return self._crop.cropping

    @property
    def origin(self) -> tuple[int, int]:
        """The place of the first shown pixel in the coded frame, to which motion vectors refer: x and y in pixels."""
        left, top = read_origin(self._stream.codec_context.extradata) if self.codec == "h264" else (0, 0)
        return left + self.cropping.left, top + self.cropping.top

    def shown_size(self, image: av.VideoFrame) -> tuple[int, int]:
        """Return the width and height of the latest frame as a player shows it, in square pixels."""
        return self.orientation.size(*shown_size(image.width, image.height, self.pixel_aspect))

    def describe_size(self, image: av.VideoFrame) -> str:
        """Return the coded size of the latest frame as text, with the shape of its pixels unless they are square."""
        return describe_size(image.width, image.height, self.pixel_aspect)

    @property
    def hidden(self) -> int:
        """The number of coded frames that the container's edit list hides from players; they are not decoded."""
        return self._log.hidden

    @property
    def decoded(self) -> int:
        """The number of the clip's frames decoded so far."""
        return len(self._log.times)

    @property
    def notes(self) -> list[Note]:
        """Problems found so far, most severe first."""
        return self._log.notes(self._stream, self.start, self.end)

    def frames(self, *, surroundings: bool = False) -> Iterator[DecodedFrame]:
        """Yield the clip's frames in order; `notes` is complete afterwards.

        Args:
            surroundings: whether to also yield the frames decoded before and after the clip, with index -1.

        Raises:
            OSError: the disk or the network fails.
        """
        while (shown := self._next()) is not None:
            image, seconds, self.pixel_aspect = shown
            after = self.end is not None and seconds >= self.end - EPSILON
            if self._whole:
                self._hold(shown, after)
            if after:
                if not surroundings:
                    return
                yield DecodedFrame(-1, seconds, image)
            elif self.start is None or seconds >= self.start - EPSILON:
                self._log.record(seconds, image.is_corrupt)
                yield DecodedFrame(self.decoded - 1, seconds, image)
            elif surroundings:
                yield DecodedFrame(-1, seconds, image)
        self._log.complete = True
        progress = Progress(self._last_packet, self._unread.end)
        self._log.cut_off |= is_cut_off(self.path, self.container, self._stream, progress)

    def continue_with(self, start: float | None, end: float | None) -> bool:
        """Move on to a clip that begins at or after the end of the current one; the file must be read as a `whole`.

        Returns:
            whether this is possible: `frames` then yields exactly the frames of a new `Video`. Otherwise, frames of the
            clip have been read already and are gone.
        """
        if self.end is None or (start or 0.0) < self.end or self._gone:
            return False
        # Frames that were read again may lie after this clip, too.
        self._again = deque([*self._held, *self._again])
        self._held.clear()
        self.start = start
        self.end = end
        self._log = replace(self._log, times=[], damaged=[], complete=False)
        return True

    def _hold(self, shown: _Shown, after: bool) -> None:
        """Keep a frame after the clip; for motion vectors, also the last I- or P-frame before it and what follows."""
        if not after:
            if not self._vectors:
                return
            if shown.image.pict_type not in (PictureType.B, PictureType.BI):
                self._held.clear()
                self._gone = False
        self._held.append(shown)
        if len(self._held) > _MAX_HELD:
            self._held.popleft()
            self._gone = True

    def seeks(self) -> bool:
        """Whether the clip is read from a key frame in the file, found by its index, rather than from the beginning.

        Reads up to that key frame; call this instead of `frames`.
        """
        first = next(self._images(), None)
        begin = self._stream.start_time
        return bool(self._sought and first is not None and (begin is None or first.pts > begin))

    def _next(self) -> _Shown | None:
        if self._again:
            return self._again.popleft()
        self._source = self._source or self._timed()
        image, seconds = next(self._source, (None, 0.0))
        if image is None:
            return None
        if self._orientation is None:
            still = is_image(self._container)
            self._orientation = Orientation.of_image_file(self.path) if still else Orientation.of(image)
        # Viewers show images with square pixels, whatever resolution their files state.
        return _Shown(self._crop(image), seconds, self._aspect.now() if self._aspect else Fraction(1))

    @property
    def orientation(self) -> Orientation:
        """The orientation of the frames; known after the first one."""
        return self._orientation or Orientation()

    def _timed(self) -> Iterator[tuple[av.VideoFrame, float]]:
        """Yield frames with their times in s, which rise."""
        images = self._images()
        times = FrameTimes(self._container, self._stream)
        for image in images:
            yield image, self._seconds(times.of(image))

    def _seconds(self, ticks: int) -> float:
        """Return a time of the stream in player time, by which clips are annotated."""
        # Some containers do not start at 0: MPEG transport streams can start at any value.
        return float(ticks * self._stream.time_base) - (self._container.start_time or 0) / av.time_base

    def _images(self) -> Iterator[av.VideoFrame]:
        """Yield frames from a key frame at or before the clip's start, or from the start if seeking is unreliable."""
        # With an edit list, the times in the container's index are not those that a player shows.
        if (
            self.start
            and not self._whole
            and self.container in _SEEKABLE
            and not self._log.hidden
            and not self._may_be_packed()
        ):
            images = self._seek(self.start)
            self._sought = images is not None
            if images is not None:
                return images
            self._container.close()
            self._open()
        return self._decode()

    def _may_be_packed(self) -> bool:
        """Whether two MPEG-4 frames may share a packet; their times can only be told by reading from the start."""
        return self.codec == "mpeg4" and bool(self._stream.codec_context.has_b_frames)

    def _seek(self, start: float) -> Iterator[av.VideoFrame] | None:
        """Return the frames after a seek; None if the first is not an intact key frame at or before `start`."""
        target = round(start * av.time_base) + (self._container.start_time or 0)
        try:
            self._container.seek(target)
        except av.error.FFmpegError:
            return None
        images = self._decode()
        first = next(images, None)
        # A decoder that starts in the middle of a group of pictures outputs damaged frames, or none for a while.
        if first is None or first.pts is None or first.is_corrupt or not first.key_frame:
            return None
        if float(first.pts * self._stream.time_base) > target / av.time_base + EPSILON:
            return None
        return chain([first], images)

    def _decode(self) -> Iterator[av.VideoFrame]:
        """Yield all frames from the current position; packets that cannot be decoded are logged and skipped."""
        for packet in self._packets():
            try:
                yield from self._stream.codec_context.decode(packet)
            except av.error.EOFError:
                return
            except av.error.FFmpegError as error:
                if is_from_machine(error):
                    raise
                timestamp = packet.pts if packet is not None else None
                self._log.broken.append(None if timestamp is None else self._seconds(timestamp))
                self._log.error = self._log.error or plain_error(error)

    def _demux(self) -> Iterator[Any]:
        """Yield the packets of the stream, or of all streams if parts of the file that are not read can be found."""
        try:
            yield from self._container.demux(self._unread.streams or self._stream)
        except IndexError:
            return  # PyAV ends each stream with an empty packet, and fails for those that appeared while it was reading

    def _packets(self) -> Iterator[Any]:
        """Yield packets, then None to flush the decoder; also after a read error, for the last intact frames."""
        joined, incomplete, skipped = JoinedStreams(self._container, self._stream), False, False
        previous: int | None = None
        try:
            for packet in self._demux():
                skipped |= self._unread.before(packet)
                # PyAV ends with an empty packet, which would flush the decoder twice.
                if not packet.size or packet.stream_index != self._stream.index:
                    continue
                joined.correct(packet)
                if skipped:
                    self._log.skipped.append(None if previous is None else self._seconds(previous))
                skipped, previous = False, packet.pts
                incomplete = packet.is_corrupt
                self._last_packet = self._last_packet if packet.pos is None else packet.pos
                yield packet
        except av.error.FFmpegError as error:
            if is_from_machine(error):
                raise
            # Some demuxers return -1, the number of EPERM, at the end of a complete file.
            if error.errno != errno.EPERM:
                self._log.error = plain_error(error)
                self._log.cut_off = True
        # A packet that the file does not hold whole; in transport streams the mark has other meanings, too.
        self._log.cut_off |= incomplete and self.container != "mpegts"
        yield None


def decode(path: Path, start: float | None = None, end: float | None = None) -> Iterator[DecodedFrame]:
    """Yield the frames of a clip in order; see `Video` for arguments, errors and file problems."""
    with Video(path, start, end) as video:
        yield from video.frames()
