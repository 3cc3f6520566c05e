"""Motion from a transcode: H.264 without B-frames, one reference, fixed groups of pictures; then the codec's vectors.

Every vector then points to the frame just before, so it needs no guess about its reference, and any coding can be
read. The frames go through our own decoding, so that none is lost, doubled or shifted on the way.

The encoder is PyAV's, in this process. The same transcode by the ffmpeg program, built with ffmpeg-python and fed
through a pipe, gave the same vectors at the same processor time, with a process more to start and to end for each
clip (a test compares the two).
"""

from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import Any

import av

from stm.preprocess.motion.block_matching import CellScaler
from stm.preprocess.motion.codec import Field, read_fields
from stm.preprocess.video.reader import DecodedFrame

GROUP = 12  # frames from one I-frame to the next, as CoViAR and its followers have it
# No look-ahead: it serves the bit rate, which nobody asks for here, and would read frames behind the clip's end.
_OPTIONS = {
    "preset": "veryfast",
    "crf": "20",
    "bf": "0",
    "refs": "1",
    "sc_threshold": "0",
    "weightp": "0",
    "rc-lookahead": "0",
    "mbtree": "0",
}


def transcode_fields(frames: Iterable[DecodedFrame], rows: int, columns: int) -> Iterator[Field]:
    """Yields one field a frame, in order."""
    return read_fields(_transcode(frames, rows, columns), "h264", rows, columns)


def _transcode(frames: Iterable[DecodedFrame], rows: int, columns: int) -> Iterator[DecodedFrame]:
    """The frames, coded and decoded again in this process, each with the vectors of the new coding."""
    scale = CellScaler(rows, columns)
    encoder, decoder = _make_encoder(scale.width, scale.height), _make_decoder()
    place = -1
    for place, frame in enumerate(frames):
        for packet in encoder.encode(scale(frame.picture, place)):
            yield from _number(decoder.decode(packet))
    if place >= 0:
        for packet in encoder.encode(None):
            yield from _number(decoder.decode(packet))
        yield from _number(decoder.decode(None))


def _number(pictures: Iterable[av.VideoFrame]) -> Iterator[DecodedFrame]:
    for picture in pictures:
        yield DecodedFrame(picture.pts or 0, 0.0, picture)


def _make_encoder(width: int, height: int) -> Any:
    encoder = av.CodecContext.create("libx264", "w")
    encoder.width, encoder.height, encoder.pix_fmt = width, height, "yuv420p"
    encoder.time_base, encoder.framerate = Fraction(1, 25), Fraction(25)
    encoder.gop_size, encoder.max_b_frames, encoder.thread_count = GROUP, 0, 1
    encoder.options = {**_OPTIONS, "g": str(GROUP)}
    return encoder


def _make_decoder() -> Any:
    decoder = av.CodecContext.create("h264", "r")
    decoder.thread_type, decoder.thread_count = "NONE", 1
    decoder.options = {"flags2": "+export_mvs"}
    return decoder
