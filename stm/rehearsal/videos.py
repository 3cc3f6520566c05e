"""Small generated clips in the codec and container that a file's name suggests, and small images."""

from fractions import Fraction
from functools import lru_cache
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
_BROKEN_SHARE = 0.4  # of a broken file's bytes that are there


def describe_clip(kind: int) -> tuple[str, list[dict[str, str]]]:
    """Return the caption of a kind of clip, and questions about it."""
    spec = _draw(kind)
    return caption_of(spec), questions_of(spec)


def write_media(path: Path, kind: int, seconds: float, broken: bool = False) -> None:
    """Write a generated video or, by the name's ending, image.

    Args:
        kind: which of the `KINDS` clips; taken modulo their number.
        seconds: length of the video; the clip is repeated until it is reached.
        broken: cut the file short, as an interrupted download leaves it.
    """
    ending = path.suffix.lower()
    image = ending in IMAGE_ENDINGS
    data = _encode_image(kind % KINDS, ending) if image else _encode(kind % KINDS, ending, round(seconds * FPS))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, data[: int(len(data) * _BROKEN_SHARE)] if broken else data)


def _draw(kind: int) -> ClipSpec:
    return draw_clip_spec(0, "rehearsal", kind % KINDS, _SPEC)


@lru_cache(maxsize=KINDS)
def _render(kind: int) -> npt.NDArray[np.uint8]:
    """[F, H, W, 3] RGB."""
    return render_clip(_draw(kind)).frames


@lru_cache(maxsize=None)
def _encode_image(kind: int, ending: str) -> bytes:
    image = cv2.cvtColor(_render(kind)[0], cv2.COLOR_RGB2BGR)
    return bytes(cv2.imencode(ending, image)[1])


@lru_cache(maxsize=None)
def _encode(kind: int, ending: str, length: int) -> bytes:
    from io import BytesIO

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
