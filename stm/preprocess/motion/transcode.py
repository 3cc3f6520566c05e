"""Motion vectors from a transcode to H.264 without B-frames, with one reference frame and fixed groups of pictures.

Every vector then points to the previous frame, so its reference is known, and videos of any codec can be measured. The
frames come from this package's decoder, so that no frame is lost, duplicated or shifted.

PyAV encodes the frames in this process. The same transcode with the ffmpeg program, called through ffmpeg-python and
fed through a pipe, produced the same vectors in the same CPU time, but needs an additional process per clip (a test
compares both).
"""

from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import Any

import av

from stm.preprocess.motion.block_matching import CellScaler
from stm.preprocess.motion.codec import Field, read_fields
from stm.preprocess.video.reader import DecodedFrame

GROUP = 12  # frames per group of pictures, as in CoViAR and later work
# No look-ahead: it only improves the bit rate, which does not matter here, and would read frames beyond the clip's end.
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
    """Yield one field per frame, in order; `rows` and `columns` are the size of the map in cells."""
    return read_fields(_transcode(frames, rows, columns), "h264", rows, columns)


def _transcode(frames: Iterable[DecodedFrame], rows: int, columns: int) -> Iterator[DecodedFrame]:
    """Re-encode and decode the frames in this process; each then has the motion vectors of the new stream."""
    scale = CellScaler(rows, columns)
    encoder = _make_encoder(scale.width, scale.height)
    decoder = _make_decoder()
    position = -1
    for position, frame in enumerate(frames):
        for packet in encoder.encode(scale(frame.image, position)):
            yield from _number(decoder.decode(packet))
    # The encoder and decoder buffer frames until they are flushed.
    if position >= 0:
        for packet in encoder.encode(None):
            yield from _number(decoder.decode(packet))
        yield from _number(decoder.decode(None))


def _number(images: Iterable[av.VideoFrame]) -> Iterator[DecodedFrame]:
    """Number frames by their timestamp, which `CellScaler` sets to the position of the source frame."""
    for image in images:
        yield DecodedFrame(image.pts or 0, 0.0, image)


def _make_encoder(width: int, height: int) -> Any:
    encoder = av.CodecContext.create("libx264", "w")
    encoder.width = width
    encoder.height = height
    encoder.pix_fmt = "yuv420p"
    encoder.time_base = Fraction(1, 25)
    encoder.framerate = Fraction(25)
    encoder.gop_size = GROUP
    encoder.max_b_frames = 0
    encoder.thread_count = 1  # there is already one process per core
    encoder.options = {**_OPTIONS, "g": str(GROUP)}
    return encoder


def _make_decoder() -> Any:
    decoder = av.CodecContext.create("h264", "r")
    decoder.thread_type = "NONE"
    decoder.thread_count = 1
    decoder.options = {"flags2": "+export_mvs"}
    return decoder
