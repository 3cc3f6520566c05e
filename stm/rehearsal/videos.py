"""Small generated clips in the codec and container that a file's name suggests, and small images."""

from fractions import Fraction
from functools import cache, lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import numpy.typing as npt

from stm.config import MovingShapesDataset
from stm.datasets.folder import IMAGE_ENDINGS
from stm.datasets.moving_shapes.clip_spec import ClipSpec, draw_clip_spec
from stm.datasets.moving_shapes.render import render_clip
from stm.datasets.moving_shapes.sentences import caption_of, questions_of
from stm.storage.files import write_bytes

FPS = 24
KINDS = 8  # different clips; files of the same kind, ending and length have the same bytes
_SPEC = MovingShapesDataset(
    source="moving-shapes", frames=48, fps=FPS, height=64, width=96, distractors=1, moving_camera=0.5
)
# (codec, container) by ending, as in the official copies: UCF101 and HMDB51 are MPEG-4 in AVI, SSv2 is VP9 in WebM.
_FORMATS = {".avi": ("mpeg4", "avi"), ".webm": ("libvpx-vp9", "webm"), ".mkv": ("libx264", "matroska")}
_DEFAULT = ("libx264", "mp4")
_BROKEN_BYTES = 64  # of a broken file


def describe_clip(kind: int) -> tuple[str, list[dict[str, str]]]:
    """Return the caption of a kind of clip, and questions about it."""
    return _describe(kind % KINDS)


def write_media(path: Path, kind: int, seconds: float, broken: bool = False) -> None:
    """Write a generated video or, by the name's ending, image.

    Args:
        kind: which of the `KINDS` clips; taken modulo their number.
        seconds: length of the video; the clip is repeated until it is reached.
        broken: cut the file short, as a download that was interrupted at once leaves it.
    """
    ending = path.suffix.lower()
    image = ending in IMAGE_ENDINGS
    data = _encode_image(kind % KINDS, ending) if image else _encode(kind % KINDS, ending, round(seconds * FPS))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, data[:_BROKEN_BYTES] if broken else data)


@lru_cache(maxsize=KINDS)
def _draw(kind: int) -> ClipSpec:
    return draw_clip_spec(0, "rehearsal", kind, _SPEC)


@lru_cache(maxsize=KINDS)
def _describe(kind: int) -> tuple[str, list[dict[str, str]]]:
    return caption_of(_draw(kind)), questions_of(_draw(kind))


@lru_cache(maxsize=KINDS)
def _render(kind: int) -> npt.NDArray[np.uint8]:
    """[F, H, W, 3] RGB."""
    return render_clip(_draw(kind)).frames


@cache
def _encode_image(kind: int, ending: str) -> bytes:
    image = cv2.cvtColor(_render(kind)[0], cv2.COLOR_RGB2BGR)
    return bytes(cv2.imencode(ending, image)[1])


@cache
def _encode(kind: int, ending: str, length: int) -> bytes:
    codec, container = _FORMATS.get(ending, _DEFAULT)
    rendered, buffer = _render(kind), BytesIO()
    with av.open(buffer, "w", format=container) as output:
        stream: Any = output.add_stream(codec, rate=FPS)
        stream.height, stream.width = rendered.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.time_base = Fraction(1, FPS)
        stream.codec_context.thread_count = 1
        if codec == "libvpx-vp9":
            stream.options = {"deadline": "realtime", "cpu-used": "8"}
        for number in range(length):
            frame = av.VideoFrame.from_ndarray(rendered[number % len(rendered)], format="rgb24")
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return buffer.getvalue()
