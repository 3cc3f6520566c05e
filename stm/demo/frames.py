"""Training and test data for the demo's small models: single frames of generated clips that the demo itself never uses.

The clips come from the splits `demo-models` (training) and `demo-models-held-out` (evaluation). A clip of `moving-shapes`
depends on the name of its split, and the demo's splits have different names, so no frame is shared.
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
NOTHING, NAMED, OTHER = 0, 1, 2  # values of a label map; OTHER + i is distractor i
_CHUNK = 32  # clips per task of a rendering process

Attributes = tuple[str, str, str]  # color, texture, shape


@dataclass(frozen=True)
class Frame:
    """One frame with its ground truth."""

    pixels: npt.NDArray[np.uint8]  # [H, W, 3] RGB
    labels: npt.NDArray[np.uint8]  # [H, W]: NOTHING, NAMED, or OTHER + i per pixel
    box: npt.NDArray[np.float32]  # [4] of the named object: x0, y0, x1, y1 in pixels
    named: Attributes
    others: tuple[Attributes, ...]
    background: str
    moving_camera: bool
    caption: str  # caption of the whole clip, including the motion
    appearance: str  # caption of what is visible in a single frame


def render_frames(split: str, clips: int, frames: int, seed: int, processes: int = 1) -> list[Frame]:
    """Render `frames` frames at random times from each of `clips` clips, in clip order.

    Half of the frames have JPEG artefacts of random strength, because the demo's frames are compressed (H.264, JPEG).
    """
    chunks = [range(start, min(start + _CHUNK, clips)) for start in range(0, clips, _CHUNK)]
    render = partial(_render_chunk, split, frames, seed)
    label = f"render {split}"
    if processes <= 1:
        parts = list(track_progress(map(render, chunks), label, len(chunks), "chunks"))
    else:
        # Spawned, because forking after torch has started threads can deadlock.
        with ProcessPoolExecutor(processes, mp_context=PlainSpawn()) as pool:
            parts = list(track_progress(pool.map(render, chunks), label, len(chunks), "chunks"))
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
            result.append(describe(spec, time, _degrade(pixels, rng), box))
    return result


def _degrade(pixels: npt.NDArray[np.uint8], rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    if rng.random() < 0.5:
        return pixels.copy()
    quality = [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(40, 96))]
    _, coded = cv2.imencode(".jpg", np.ascontiguousarray(pixels[..., ::-1]), quality)
    decoded = np.asarray(cv2.imdecode(coded, cv2.IMREAD_COLOR), np.uint8)
    return np.ascontiguousarray(decoded[..., ::-1])


def describe(spec: ClipSpec, time: int, pixels: npt.NDArray[np.uint8], box: npt.NDArray[np.float32]) -> Frame:
    """The frame with index `time` of a clip, with its ground truth; pixels: uint8 [H, W, 3], box: [4]."""
    labels = np.zeros((spec.height, spec.width), np.uint8)
    for number, thing in enumerate(spec.distractors):
        labels[_cover(thing, spec, time)] = OTHER + number
    labels[_cover(spec.named, spec, time)] = NAMED  # assigned last, because the named object is in front
    return Frame(
        pixels, labels, box, _attributes(spec.named), tuple(_attributes(t) for t in spec.distractors), spec.background,
        spec.camera.moving, caption_of(spec), appearance_caption(spec),
    )  # fmt: skip


def _attributes(thing: ObjectSpec) -> Attributes:
    return thing.color, thing.texture, thing.shape


def _cover(thing: ObjectSpec, spec: ClipSpec, time: int) -> npt.NDArray[np.bool_]:
    """[H, W]: the pixels that an object's outline covers."""
    x, y, side, angle = track(thing.path, spec.frames)[time]
    x, y = np.array([x, y]) - camera_track(spec.camera, spec.frames)[time]
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    corners = outline(thing.shape) @ turn.T * side / 2
    mask = np.zeros((spec.height, spec.width), np.uint8)
    # The hole of a ring is its outline, scaled about the centre.
    for scale, value in ((1.0, 1), (RING_HOLE, 0)) if thing.shape == "ring" else ((1.0, 1),):
        cv2.fillPoly(mask, [np.round(corners * scale + (x, y)).astype(np.int32)], value)
    return mask.astype(bool)


# -------------------------------------------------------------------------------------------------------- texts


def all_texts() -> list[str]:
    """Texts that together contain every word of the generated captions, for building the tokenizers' vocabularies."""
    words = [*COLORS, *TEXTURES, *SHAPES, *BACKGROUNDS, *MOTIONS.values()]
    labels = [label.replace("_", " ") for label in MOTIONS]
    return [*words, *labels, "a an over background", *NEUTRAL_TEXTS]


NEUTRAL_TEXTS = ("something", "an object", "a shape that moves", "a photo of an object", "a video of an object")


@dataclass(frozen=True)
class Meaning:
    """The attributes that a text mentions; None for unmentioned attributes."""

    color: str | None = None
    texture: str | None = None
    shape: str | None = None
    background: str | None = None


def sample_object_text(frame: Frame, rng: np.random.Generator) -> tuple[str, Meaning]:
    """Sample a text about the named object of a frame: its caption or part of it."""
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


def sample_background_text(frame: Frame, rng: np.random.Generator) -> tuple[str, Meaning]:
    """Sample a text about the background of a frame."""
    name = frame.background
    text = rng.choice((f"a {name} background", name, f"a photo of {name}", f"over a {name} background"))
    return str(text), Meaning(background=name)


def _article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


# ----------------------------------------------------------------------------------------------------- captions


def describes(caption: str, frame: Frame) -> bool:
    """Whether `caption` is the appearance caption of any object in the frame, named or distractor."""
    return caption in [
        f"{_article(' '.join(attributes))} over a {frame.background} background"
        for attributes in (frame.named, *frame.others)
    ]


def all_captions() -> list[str]:
    """Appearance captions that together contain every word that occurs in any appearance caption."""
    objects = [(c, TEXTURES[0], SHAPES[0]) for c in COLORS] + [
        (next(iter(COLORS)), t, s) for t in TEXTURES for s in SHAPES
    ]
    return [
        f"{_article(' '.join(attributes))} over a {background} background"
        for attributes in objects
        for background in BACKGROUNDS
    ]
