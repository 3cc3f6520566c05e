"""What a player shows of a video file: one of its streams, a part of each frame, and pixels that may not be square."""

import re
from fractions import Fraction
from typing import Any, NamedTuple

import av

# The ffmpeg program prefers a default stream unless another one has this many more pixels.
_DEFAULT_BONUS = 5_000_000
# Codecs of single images. A stream of them whose container reports no frame count, beside a stream of another codec, is a
# thumbnail that the file does not mark as one.
_IMAGE_CODECS = frozenset(["mjpeg", "png", "apng", "bmp", "gif", "webp", "tiff", "jpeg2000", "jpegxl"])
_STREAM = re.compile(r"\s+Stream #\d+:(\d+)")
_CROPPING = re.compile(r"\s+Frame Cropping: (\d+)/(\d+)/(\d+)/(\d+)")


class Cropping(NamedTuple):
    """Pixels that the container hides at each side of the coded frame, before rotation."""

    left: int = 0
    right: int = 0
    top: int = 0
    bottom: int = 0

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Return the size of what remains of a frame, in pixels; at least 0."""
        return max(0, width - self.left - self.right), max(0, height - self.top - self.bottom)


def choose_stream(container: Any) -> Any | None:
    """Return the video stream that players show; None if there is none.

    As in the ffmpeg program, this is the default or the largest stream, the first of equals, and never a cover image;
    in addition, a thumbnail that is not marked as a cover image is chosen only if the file contains nothing else.
    """
    cover = av.stream.Disposition.attached_pic
    streams = [s for s in container.streams.video if cover not in s.disposition and s.codec_context is not None]
    moving = [s for s in streams if not _is_thumbnail(s, streams)]
    return max(moving or streams, key=_preference, default=None)


def _is_thumbnail(stream: Any, streams: list[Any]) -> bool:
    marked = av.stream.Disposition.still_image | av.stream.Disposition.timed_thumbnails
    if stream.disposition & marked or stream.frames == 1:
        return True
    others = {s.codec_context.name for s in streams} - _IMAGE_CODECS
    return not stream.frames and stream.codec_context.name in _IMAGE_CODECS and bool(others)


def _preference(stream: Any) -> int:
    default = av.stream.Disposition.default in stream.disposition
    pixels: int = stream.codec_context.width * stream.codec_context.height
    return pixels + _DEFAULT_BONUS * default


def read_cropping(container: Any, stream: Any) -> Cropping:
    """Return the container's crop of a stream: `PixelCrop...` in Matroska, `clap` in MP4."""
    # PyAV exposes it only in the text that ffmpeg prints about a file. Its log level must be raised for that; no decoder
    # is running yet, so no thread of ffmpeg can wait for Python's lock.
    av.logging.set_level(av.logging.INFO)
    try:
        lines = container.dumps_format().splitlines()
    finally:
        av.logging.set_level(None)
        av.logging.restore_default_callback()
    described = None
    for line in lines:
        if match := _STREAM.match(line):
            described = int(match[1])
        elif described == stream.index and (match := _CROPPING.fullmatch(line)):
            return Cropping(*map(int, match.groups()))
    return Cropping()


class PixelAspect:
    """The shape of a stream's pixels over time: width / height of a pixel as shown; 1 if unknown.

    As in the ffmpeg program, the container's value overrides that of the codec, which may change within the stream.
    """

    def __init__(self, stream: Any) -> None:
        self._context = stream.codec_context
        # PyAV returns the container's value, or the codec's if there is none.
        shown = _valid(stream.sample_aspect_ratio)
        self._of_container = shown if shown != _valid(self._context.sample_aspect_ratio) else None

    def now(self) -> Fraction:
        """Return the value for the frame that has just been decoded."""
        return self._of_container or _valid(self._context.sample_aspect_ratio) or Fraction(1)


def _valid(aspect: Fraction | None) -> Fraction | None:
    return Fraction(aspect) if aspect is not None and aspect > 0 else None


def shown_size(width: int, height: int, aspect: Fraction) -> tuple[int, int]:
    """Return the size in square pixels, before rotation: the height is kept, as in ffmpeg's `scale=iw*sar:ih`."""
    return max(1, round(width * aspect)), height


def describe_size(width: int, height: int, aspect: Fraction) -> str:
    """Return a size as text: `720 x 576 pixels of shape 16:15`, in which the shape is left out if it is square."""
    shape = "" if aspect == 1 else f" of shape {aspect.numerator}:{aspect.denominator}"
    return f"{width} x {height} pixels{shape}"
