"""Training data of the demo's two small models: single frames of generated clips that the demo never uses.

The clips come from the splits `demo-models` (training) and `demo-models-held-out` (measurement); the demo's own splits have
other names, and a clip of `moving-shapes` depends on its split's name, so no frame is shared.
"""

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial

import cv2
import numpy as np
import numpy.typing as npt

from stm.config import MovingShapesDataset
from stm.datasets.moving_shapes.clip_spec import ObjectSpec
from stm.datasets.moving_shapes.generate import (
    BACKGROUNDS,
    COLORS,
    MOTIONS,
    SHAPES,
    TEXTURES,
    ClipSpec,
    appearance_caption,
    caption_of,
    draw_clip_spec,
    render_clip,
)
from stm.datasets.moving_shapes.motions import camera_track, track
from stm.datasets.moving_shapes.outlines import RING_HOLE, outline
from stm.jobs.progress import track as track_progress
from stm.jobs.workers import PlainSpawn

TRAIN_SPLIT, HELD_OUT_SPLIT = "demo-models", "demo-models-held-out"
NOTHING, NAMED, OTHER = 0, 1, 2  # values of a label map; OTHER + i is the distractor number i
_CHUNK = 32  # clips rendered at a time by a process

Looks = tuple[str, str, str]  # color, texture, shape


@dataclass(frozen=True)
class Frame:
    """One frame and the truth about it."""

    pixels: npt.NDArray[np.uint8]  # [H, W, 3] RGB
    labels: npt.NDArray[np.uint8]  # [H, W]: NOTHING, NAMED, OTHER or more at each pixel
    box: npt.NDArray[np.float32]  # [4] of the named object: x0, y0, x1, y1
    named: Looks
    others: tuple[Looks, ...]
    background: str
    moving_camera: bool
    caption: str  # of the whole clip, motion included
    appearance: str  # what the frame alone can decide


def render_frames(split: str, clips: int, frames: int, seed: int, processes: int = 1) -> list[Frame]:
    """Renders `frames` frames at random times of each of `clips` clips, in the order of the clips.

    Half of the frames get a JPEG's artefacts of random strength: the demo's frames went through H.264 and JPEG.
    """
    chunks = [range(start, min(start + _CHUNK, clips)) for start in range(0, clips, _CHUNK)]
    render = partial(_render_chunk, split, frames, seed)
    what = f"render {split}"
    if processes <= 1:
        parts = list(track_progress(map(render, chunks), what, len(chunks), "chunks"))
    else:
        # Processes are started afresh: forking a process that has run torch's threads can hang.
        with ProcessPoolExecutor(processes, mp_context=PlainSpawn()) as pool:
            parts = list(track_progress(pool.map(render, chunks), what, len(chunks), "chunks"))
    return [frame for part in parts for frame in part]


def _render_chunk(split: str, frames: int, seed: int, indexes: Sequence[int]) -> list[Frame]:
    cv2.setNumThreads(1)
    dataset = MovingShapesDataset(source="moving-shapes")
    result = []
    for index in indexes:
        spec = draw_clip_spec(seed, split, index, dataset)
        rng = np.random.default_rng([seed, index])
        times = sorted(rng.choice(spec.frames, frames, replace=False).tolist())
        rendered = render_clip(spec, which=times)
        for time, pixels, box in zip(times, rendered.frames, rendered.boxes, strict=True):
            result.append(describe(spec, time, _worsen(pixels, rng), box))
    return result


def _worsen(pixels: npt.NDArray[np.uint8], rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    if rng.random() < 0.5:
        return pixels.copy()
    quality = [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(40, 96))]
    _, coded = cv2.imencode(".jpg", np.ascontiguousarray(pixels[..., ::-1]), quality)
    decoded = np.asarray(cv2.imdecode(coded, cv2.IMREAD_COLOR), np.uint8)
    return np.ascontiguousarray(decoded[..., ::-1])


def describe(spec: ClipSpec, time: int, pixels: npt.NDArray[np.uint8], box: npt.NDArray[np.float32]) -> Frame:
    labels = np.zeros((spec.height, spec.width), np.uint8)
    for number, thing in enumerate(spec.distractors):
        labels[_cover(thing, spec, time)] = OTHER + number
    labels[_cover(spec.named, spec, time)] = NAMED
    return Frame(
        pixels, labels, box, _looks(spec.named), tuple(_looks(t) for t in spec.distractors), spec.background,
        spec.camera.moving, caption_of(spec), appearance_caption(spec),
    )  # fmt: skip


def _looks(thing: ObjectSpec) -> Looks:
    return thing.color, thing.texture, thing.shape


def _cover(thing: ObjectSpec, spec: ClipSpec, time: int) -> npt.NDArray[np.bool_]:
    """[H, W]: the pixels that an object covers, from its outline."""
    x, y, side, angle = track(thing.path, spec.frames)[time]
    x, y = np.array([x, y]) - camera_track(spec.camera, spec.frames)[time]
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    corners = outline(thing.shape) @ turn.T * side / 2
    mask = np.zeros((spec.height, spec.width), np.uint8)
    # Corners of the ring's hole are the outline's, scaled about the centre.
    for scale, value in ((1.0, 1), (RING_HOLE, 0)) if thing.shape == "ring" else ((1.0, 1),):
        cv2.fillPoly(mask, [np.round(corners * scale + (x, y)).astype(np.int32)], value)
    return mask.astype(bool)


# -------------------------------------------------------------------------------------------------------- texts


def all_texts() -> list[str]:
    """Texts with every word of the generated captions; the tokenizers' vocabulary is made from them."""
    words = [*COLORS, *TEXTURES, *SHAPES, *BACKGROUNDS, *MOTIONS.values()]
    labels = [label.replace("_", " ") for label in MOTIONS]
    return [*words, *labels, "a an over background", *NEUTRAL_TEXTS]


NEUTRAL_TEXTS = ("something", "an object", "a shape that moves", "a photo of an object", "a video of an object")


@dataclass(frozen=True)
class Meaning:
    """What a text says; None: it does not say."""

    color: str | None = None
    texture: str | None = None
    shape: str | None = None
    background: str | None = None


def draw_object_text(frame: Frame, rng: np.random.Generator) -> tuple[str, Meaning]:
    """A text about the named object of a frame: the caption, or a part of it."""
    color, texture, shape = frame.named
    kind = rng.random()
    if kind < 0.45:
        return frame.caption, Meaning(color, texture, shape, frame.background)
    if kind < 0.7:
        return frame.appearance, Meaning(color, texture, shape, frame.background)
    if kind < 0.8:
        return _article(f"{color} {texture} {shape}"), Meaning(color, texture, shape)
    if kind < 0.9:
        return _article(f"{color} {shape}"), Meaning(color, None, shape)
    if kind < 0.95:
        return _article(f"{color} {texture} {rng.choice(('object', 'shape'))}"), Meaning(color, texture)
    verb = MOTIONS[str(rng.choice(list(MOTIONS)))]
    return f"{_article(f'{color} {shape}')} {verb}", Meaning(color, None, shape)


def draw_background_text(frame: Frame, rng: np.random.Generator) -> tuple[str, Meaning]:
    """A text about the background of a frame."""
    name = frame.background
    text = rng.choice((f"a {name} background", name, f"a photo of {name}", f"over a {name} background"))
    return str(text), Meaning(background=name)


def _article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


# ----------------------------------------------------------------------------------------------------- captions


def describes(caption: str, frame: Frame) -> bool:
    """Whether `caption` is the appearance caption of any object of the frame, named or not."""
    return caption in [
        f"{_article(' '.join(looks))} over a {frame.background} background" for looks in (frame.named, *frame.others)
    ]


def all_captions() -> list[str]:
    """One appearance caption for each word that one can hold."""
    looks = [(c, TEXTURES[0], SHAPES[0]) for c in COLORS] + [
        (next(iter(COLORS)), t, s) for t in TEXTURES for s in SHAPES
    ]
    return [f"{_article(' '.join(look))} over a {place} background" for look in looks for place in BACKGROUNDS]
