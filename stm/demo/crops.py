"""Crops of generated frames for the demo's small CLIP, and which of them agree with which texts."""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from stm.demo.frames import NAMED, NOTHING, OTHER, Frame, Meaning

SCENE, WHOLE, PART, EDGE, DISTRACTOR, BACKDROP = range(6)
"""Kinds of crops: the scene or much of it; the named object whole; a patch that the named object fills in part (PART)
or only touches (EDGE); a patch of another object; a patch of pure background."""

_CELL = (10.0, 27.0)  # side of a patch in pixels: the demo's cells have 16 of a 128 pixel frame
_PART, _TOUCH = 0.25, 0.02  # share of a patch that the named object covers: PART above the first, EDGE above the second
_RESAMPLING = (cv2.INTER_LINEAR, cv2.INTER_CUBIC, cv2.INTER_AREA)
# How many crops of which kind each frame gives. A frame without distractors gives background instead.
_PLAN = (SCENE, WHOLE, WHOLE, WHOLE, WHOLE, PART, PART, PART, EDGE, DISTRACTOR, BACKDROP, BACKDROP)

Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels


@dataclass(frozen=True)
class Crops:
    """C crops of the frames of a batch."""

    pixels: npt.NDArray[np.uint8]  # [C, S, S, 3]
    kinds: npt.NDArray[np.int64]  # [C]
    frames: npt.NDArray[np.int64]  # [C] number of the frame in the batch


def draw_crops(frames: Sequence[Frame], size: int, rng: np.random.Generator) -> Crops:
    """Crops of every scale, each resized to `size` x `size` pixels; half of them mirrored."""
    pixels, kinds, numbers = [], [], []
    for number, frame in enumerate(frames):
        for wanted in _PLAN:
            box = _draw_box(frame, wanted, rng)
            pixels.append(_cut(frame.pixels, box, size, rng))
            kinds.append(wanted if wanted in (SCENE, WHOLE) else classify(frame, box))
            numbers.append(number)
    return Crops(np.stack(pixels), np.array(kinds), np.array(numbers))


def classify(frame: Frame, box: Box) -> int:
    """The kind of a patch, from what covers its pixels; -1: of no kind (two objects, or a sliver of another)."""
    x0, y0, x1, y1 = (round(v) for v in box)
    labels = frame.labels[y0:y1, x0:x1]
    named, other = float((labels == NAMED).mean()), float((labels >= OTHER).mean())
    if named >= _TOUCH:
        return PART if named >= _PART else EDGE
    if named > 0:
        return -1
    if other >= _PART:
        return DISTRACTOR
    return BACKDROP if other == 0 else -1


def _draw_box(frame: Frame, wanted: int, rng: np.random.Generator) -> Box:
    if wanted == SCENE:
        return _around(frame, rng.uniform(0.4, 3.0), rng)
    if wanted == WHOLE:
        return _around(frame, rng.uniform(-0.05, 0.35), rng)
    shown = {
        PART: frame.labels == NAMED, EDGE: frame.labels == NAMED,
        DISTRACTOR: frame.labels >= OTHER, BACKDROP: frame.labels == NOTHING,
    }[wanted]  # fmt: skip
    places = np.flatnonzero(shown)
    if not len(places):
        return _draw_box(frame, BACKDROP, rng)
    for _ in range(6):
        box = _patch_at(frame, int(rng.choice(places)), rng)
        if classify(frame, box) == wanted:
            break
    return box


def _around(frame: Frame, margin: float, rng: np.random.Generator) -> Box:
    """The named object's box, grown by up to `margin` of its size on each side, within the frame."""
    height, width = frame.labels.shape
    x0, y0, x1, y1 = (float(v) for v in frame.box)
    left, right, up, down = rng.uniform(0.3, 1.0, 4) * margin
    wide, high = x1 - x0, y1 - y0
    return (
        max(x0 - left * wide, 0), max(y0 - up * high, 0),
        min(x1 + right * wide, width), min(y1 + down * high, height),
    )  # fmt: skip


def _patch_at(frame: Frame, place: int, rng: np.random.Generator) -> Box:
    """A nearly square patch that holds pixel number `place`, anywhere inside."""
    height, width = frame.labels.shape
    y, x = divmod(place, width)
    side = float(np.exp(rng.uniform(*np.log(_CELL))))
    wide, high = side * rng.uniform(0.9, 1.1, 2)
    x0 = float(np.clip(x - rng.uniform(0, wide), 0, width - wide))
    y0 = float(np.clip(y - rng.uniform(0, high), 0, height - high))
    return x0, y0, x0 + wide, y0 + high


def _cut(pixels: npt.NDArray[np.uint8], box: Box, size: int, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    x0, y0, x1, y1 = (round(v) for v in box)
    crop = pixels[y0:y1, x0:x1]
    # No user's resize is known here: all three are taken, but shrinking always averages.
    method = cv2.INTER_AREA if max(crop.shape[:2]) > 2 * size else _RESAMPLING[int(rng.integers(3))]
    resized = np.asarray(cv2.resize(crop, (size, size), interpolation=method), np.uint8)
    return resized[:, ::-1] if rng.random() < 0.5 else resized


# ---------------------------------------------------------------------------------------- which crops fit which texts


def match(crops: Crops, frames: Sequence[Frame], texts: Sequence[Meaning]) -> npt.NDArray[np.int8]:
    """[C, texts]: 1 where a crop shows what a text says, 0 where it does not, -1 where neither is fair to say."""
    fits = np.array([[_fits(frame, text) for text in texts] for frame in frames])  # [frames, texts, 6 kinds + 1]
    return np.asarray(fits[crops.frames, :, crops.kinds], np.int8)


def _fits(frame: Frame, text: Meaning) -> list[int]:
    """For each kind of crop of `frame`, and for crops of no kind: does it show what the text says?"""
    same_background = text.background == frame.background
    if text.color is None:  # a text about a background; objects may show it around them, so those count neither way
        scene = -1 if same_background else 0
        return [scene, -1, 0, -1, 0, int(same_background), -1]
    alike = [_alike(looks, text) for looks in (frame.named, *frame.others)]
    scene = int(alike[0][1] and (text.background is None or same_background))
    if not scene and any(whole for _, whole in alike[1:]):
        scene = -1  # the scene shows the text's object, but it is not the one that the crop is about
    # A patch shows no shape. What a distractor's patch shows is not known when there are several.
    return [scene, int(alike[0][1]), int(alike[0][0]), -1, -1 if any(p for p, _ in alike[1:]) else 0, 0, -1]


def _alike(looks: tuple[str, str, str], text: Meaning) -> tuple[bool, bool]:
    """Whether color and texture agree, and whether the shape does too, as far as the text names them."""
    color, texture, shape = looks
    part = text.color == color and text.texture in (None, texture)
    return part, part and text.shape in (None, shape)
