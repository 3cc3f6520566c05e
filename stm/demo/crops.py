"""Crops of generated frames for training the demo's small CLIP, and how they match texts."""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from stm.demo.frames import NAMED, NOTHING, OTHER, Attributes, Frame, Meaning

SCENE, WHOLE, PART, EDGE, DISTRACTOR, BACKDROP = range(6)
"""Kinds of crops: most or all of the scene; the whole named object; a patch with a substantial part (PART) or only a
sliver (EDGE) of the named object; a patch of a distractor; a patch that shows only background."""

_CELL = (10.0, 27.0)  # range of a patch's side in pixels; a cell of the demo has 16
_MIN_PART, _MIN_EDGE = 0.25, 0.02  # minimum fraction of a patch that an object covers
_RESAMPLING = (cv2.INTER_LINEAR, cv2.INTER_CUBIC, cv2.INTER_AREA)
# The crops of each frame. In a frame without distractors, DISTRACTOR is replaced by background.
_KINDS_PER_FRAME = (SCENE, WHOLE, WHOLE, WHOLE, WHOLE, PART, PART, PART, EDGE, DISTRACTOR, BACKDROP, BACKDROP)

Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels


@dataclass(frozen=True)
class Crops:
    """C crops of the frames of a batch."""

    pixels: npt.NDArray[np.uint8]  # [C, S, S, 3]
    kinds: npt.NDArray[np.int64]  # [C]
    frames: npt.NDArray[np.int64]  # [C] index of each crop's frame in the batch


def sample_crops(frames: Sequence[Frame], size: int, rng: np.random.Generator) -> Crops:
    """Sample 12 crops per frame at every scale, resized to `size` x `size` pixels; half of them are mirrored."""
    pixels, kinds, indexes = [], [], []
    for index, frame in enumerate(frames):
        for kind in _KINDS_PER_FRAME:
            box = _sample_box(frame, kind, rng)
            pixels.append(_cut(frame.pixels, box, size, rng))
            kinds.append(kind if kind in (SCENE, WHOLE) else classify(frame, box))
            indexes.append(index)
    return Crops(np.stack(pixels), np.array(kinds), np.array(indexes))


def classify(frame: Frame, box: Box) -> int:
    """The kind of a patch, from the objects that cover it; -1: no kind (too small a part of an object)."""
    x0, y0, x1, y1 = (round(v) for v in box)
    labels = frame.labels[y0:y1, x0:x1]
    named, other = float((labels == NAMED).mean()), float((labels >= OTHER).mean())
    if named >= _MIN_EDGE:
        return PART if named >= _MIN_PART else EDGE
    if named > 0:
        return -1
    if other >= _MIN_PART:
        return DISTRACTOR
    return BACKDROP if other == 0 else -1


def _sample_box(frame: Frame, kind: int, rng: np.random.Generator) -> Box:
    if kind == SCENE:
        return _around(frame, rng.uniform(0.4, 3.0), rng)
    if kind == WHOLE:
        return _around(frame, rng.uniform(-0.05, 0.35), rng)
    candidates = {
        PART: frame.labels == NAMED, EDGE: frame.labels == NAMED,
        DISTRACTOR: frame.labels >= OTHER, BACKDROP: frame.labels == NOTHING,
    }[kind]  # fmt: skip
    positions = np.flatnonzero(candidates)
    if not len(positions):
        return _sample_box(frame, BACKDROP, rng)
    # A patch may be of a different kind than requested; it is labelled by its contents, so a few attempts suffice.
    for _ in range(6):
        box = _patch_at(frame, int(rng.choice(positions)), rng)
        if classify(frame, box) == kind:
            break
    return box


def _around(frame: Frame, margin: float, rng: np.random.Generator) -> Box:
    """The named object's box, extended on each side by up to `margin` of its size and clipped to the frame."""
    height, width = frame.labels.shape
    x0, y0, x1, y1 = (float(v) for v in frame.box)
    left, right, up, down = rng.uniform(0.3, 1.0, 4) * margin
    box_width, box_height = x1 - x0, y1 - y0
    return (
        max(x0 - left * box_width, 0), max(y0 - up * box_height, 0),
        min(x1 + right * box_width, width), min(y1 + down * box_height, height),
    )  # fmt: skip


def _patch_at(frame: Frame, position: int, rng: np.random.Generator) -> Box:
    """A nearly square patch that contains the pixel with flat index `position` at a random location."""
    height, width = frame.labels.shape
    y, x = divmod(position, width)
    side = float(np.exp(rng.uniform(*np.log(_CELL))))
    patch_width, patch_height = side * rng.uniform(0.9, 1.1, 2)
    x0 = float(np.clip(x - rng.uniform(0, patch_width), 0, width - patch_width))
    y0 = float(np.clip(y - rng.uniform(0, patch_height), 0, height - patch_height))
    return x0, y0, x0 + patch_width, y0 + patch_height


def _cut(pixels: npt.NDArray[np.uint8], box: Box, size: int, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    x0, y0, x1, y1 = (round(v) for v in box)
    crop = pixels[y0:y1, x0:x1]
    # Users' resizing method is unknown, so one of three interpolations is sampled; strong downscaling always averages.
    method = cv2.INTER_AREA if max(crop.shape[:2]) > 2 * size else _RESAMPLING[int(rng.integers(3))]
    resized = np.asarray(cv2.resize(crop, (size, size), interpolation=method), np.uint8)
    return resized[:, ::-1] if rng.random() < 0.5 else resized


# ------------------------------------------------------------------------------------------ match of crops and texts


def match(crops: Crops, frames: Sequence[Frame], texts: Sequence[Meaning]) -> npt.NDArray[np.int8]:
    """[C, texts]: 1 for matching pairs, 0 for mismatched pairs, -1 for ambiguous pairs, which have no loss."""
    # [frames, texts, 6 kinds + 1]
    table = np.array([[_match_kinds(frame, text) for text in texts] for frame in frames])
    return np.asarray(table[crops.frames, :, crops.kinds], np.int8)


def _match_kinds(frame: Frame, text: Meaning) -> list[int]:
    """The values of `match` for each kind of crop of `frame`, followed by the value for crops without a kind."""
    same_background = text.background == frame.background
    if text.color is None:  # a text about a background, which may also be visible in crops of objects: ambiguous
        scene = -1 if same_background else 0
        return [scene, -1, 0, -1, 0, int(same_background), -1]
    agrees = [_agree(attributes, text) for attributes in (frame.named, *frame.others)]
    scene = int(agrees[0][1] and (text.background is None or same_background))
    if not scene and any(whole for _, whole in agrees[1:]):
        scene = -1  # the scene shows the text's object, but as a distractor
    # A patch is too small to show a shape, and it is unknown which of several distractors it shows.
    return [scene, int(agrees[0][1]), int(agrees[0][0]), -1, -1 if any(p for p, _ in agrees[1:]) else 0, 0, -1]


def _agree(attributes: Attributes, text: Meaning) -> tuple[bool, bool]:
    """Whether color and texture match the text, and whether all three attributes do; unmentioned attributes match."""
    color, texture, shape = attributes
    part = text.color == color and text.texture in (None, texture)
    return part, part and text.shape in (None, shape)
