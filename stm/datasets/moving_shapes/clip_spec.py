"""The contents of a clip of `moving-shapes`, sampled from (seed, split, index) alone."""

import hashlib
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from stm.config import MovingShapesDataset
from stm.datasets.moving_shapes.motions import (
    MOTIONS,
    SIDE,
    CameraSpec,
    PathSpec,
    camera_track,
    draw_camera,
    draw_path,
    track,
)
from stm.datasets.moving_shapes.outlines import SHAPES, boxes_of

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (222, 38, 38),
    "orange": (255, 140, 20),
    "yellow": (250, 226, 40),
    "green": (44, 190, 60),
    "cyan": (40, 214, 224),
    "blue": (44, 72, 230),
    "purple": (160, 50, 200),
    "white": (244, 244, 244),
}
# A plain texture is excluded, because a spinning plain circle would look like one at rest.
TEXTURES: tuple[str, ...] = ("striped", "checkered", "dotted", "two-tone")
BACKGROUNDS: tuple[str, ...] = ("brick", "grass", "wood", "water", "sand", "stone")
# The background that belongs to a motion. Opposite motions, and both waves, share one: it tells what kind of motion to expect,
# and only the motion itself tells its direction.
BACKGROUND_OF: dict[str, str] = {motion: BACKGROUNDS[number // 2] for number, motion in enumerate(MOTIONS)}

# Minimum share of the named object's box that is in view in each frame, for a moving camera; of objects above the standard size,
# accordingly less.
MIN_VISIBLE = 0.75
DISTRACTOR_SCALE = 0.85  # distractors are a little smaller than the named object
_CANDIDATES = 8  # candidate paths per distractor; the one with the least overlap is used
_COMPANION_DISTANCE = (
    0.6  # from the named object to a companion at its side, as a share of the sum of their median sides
)
_PART_RADIUS = (0.2, 0.35)  # radii of a moving part of the background, as shares of the frame's sides

Companion = Literal["in step", "independent"]


@dataclass(frozen=True)
class ObjectSpec:
    """The appearance and the motion of an object."""

    shape: str
    color: str
    texture: str
    path: PathSpec

    @property
    def motion(self) -> str:
        return self.path.motion


@dataclass(frozen=True)
class BackgroundPart:
    """An ellipse of the background, at rest relative to it, in which a texture of the same kind moves.

    The ellipse is centred at `path.x` and `path.y`. The texture moves, turns and scales as an object with this path.
    """

    radius_x: float  # pixels
    radius_y: float
    seed: int
    path: PathSpec


@dataclass(frozen=True)
class ClipSpec:
    """The full description of a clip. `named` is the object that the captions describe."""

    video_id: str
    split: str
    width: int
    height: int
    frames: int
    fps: int
    named: ObjectSpec
    distractors: tuple[ObjectSpec, ...]  # each differs from `named` in shape and color; a companion is the first one
    background: str
    background_seed: int
    camera: CameraSpec
    part: BackgroundPart | None = None  # what moves of the background
    companion: Companion | None = None

    @property
    def label(self) -> str:
        return self.named.motion


def clip_id(split: str, index: int) -> str:
    return f"{split}-{index:06d}"


def draw_clip_spec(seed: int, split: str, index: int, dataset: MovingShapesDataset) -> ClipSpec:
    """Samples the clip with a given index (from 0) in a split.

    Labels are assigned in blocks that contain each class exactly once, so that every split is balanced and a clip does
    not change when the number of clips does.
    """
    # One generator per clip, so that clips depend neither on each other nor on the number of clips.
    rng = _generator(seed, split, "clip", index)
    # Each option has a generator of its own, so that it does not change what other options draw.
    sizes, scene, beside, within = (
        _generator(seed, split, what, index) for what in ("sizes", "background", "companion", "part")
    )
    label = _label(seed, split, index)
    size = _draw_size(sizes, dataset)
    named = ObjectSpec(*_appearance(rng), _scaled(draw_path(rng, label, dataset.width, dataset.height), size))
    moves = bool(rng.random() < dataset.moving_camera)
    camera = _fitting_camera(rng, named, size, dataset) if moves else CameraSpec()
    distractors: tuple[ObjectSpec, ...] = ()
    for _ in range(int(rng.integers(dataset.distractors + 1))):
        distractors += (_distractor(rng, _draw_size(sizes, dataset), (named, *distractors), dataset),)
    background = str(rng.choice(BACKGROUNDS))
    background_seed = int(rng.integers(2**31))
    goes_along = scene.random() < dataset.background_context
    if goes_along:
        background = BACKGROUND_OF[label]
    companion = None
    if dataset.companion is not None:
        companion, item = _draw_companion(beside, (named, *distractors), size, dataset.companion, dataset)
        distractors = (item, *distractors)
    moves = bool(within.random() < dataset.moving_background)
    part = _draw_part(within, named.path if goes_along else None, dataset) if moves else None
    return ClipSpec(
        video_id=clip_id(split, index),
        split=split,
        width=dataset.width,
        height=dataset.height,
        frames=dataset.frames,
        fps=dataset.fps,
        named=named,
        distractors=distractors,
        background=background,
        background_seed=background_seed,
        camera=camera,
        part=part,
        companion=companion,
    )


def _generator(seed: int, split: str, what: str, number: int) -> np.random.Generator:
    digest = hashlib.sha256(f"{seed}/{split}/{what}/{number}".encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "big")))


def _label(seed: int, split: str, index: int) -> str:
    block, place = divmod(index, len(MOTIONS))
    return list(MOTIONS)[int(_generator(seed, split, "labels", block).permutation(len(MOTIONS))[place])]


def _appearance(rng: np.random.Generator, unlike: ObjectSpec | None = None) -> tuple[str, str, str]:
    """A shape, color and texture; shape and color differ from those of `unlike`."""
    shapes = [s for s in SHAPES if unlike is None or s != unlike.shape]
    colors = [c for c in COLORS if unlike is None or c != unlike.color]
    return str(rng.choice(shapes)), str(rng.choice(colors)), str(rng.choice(TEXTURES))


def _draw_size(rng: np.random.Generator, dataset: MovingShapesDataset) -> float:
    """An object's median side, in units of the standard one."""
    low, high = dataset.object_size
    return float(low * (high / low) ** rng.random() / SIDE)


def _scaled(path: PathSpec, size: float) -> PathSpec:
    return replace(path, side=path.side * size)


def _fitting_camera(
    rng: np.random.Generator, named: ObjectSpec, size: float, dataset: MovingShapesDataset
) -> CameraSpec:
    """A moving camera whose motion is reduced until most of the named object stays in view."""
    scale, enough = 1.0, MIN_VISIBLE / max(1.0, size)
    for _ in range(24):
        camera = draw_camera(rng, dataset.width, dataset.height, dataset.camera_amplitude, scale)
        if visible_share(named, camera, dataset.frames, dataset.width, dataset.height).min() >= enough:
            break
        scale *= 0.94
    return camera


def full_boxes(item: ObjectSpec, camera: CameraSpec, frames: int) -> npt.NDArray[np.float64]:
    """[F, 4]: x0, y0, x1, y1 in pixels, not clipped to the frame."""
    places = track(item.path, frames)
    places[:, :2] -= camera_track(camera, frames)
    return boxes_of(item.shape, places)


def true_boxes(item: ObjectSpec, spec: ClipSpec) -> npt.NDArray[np.float32]:
    """[F, 4]: x0, y0, x1, y1 in pixels, clipped to the frame; zero area if the object is out of view."""
    boxes = full_boxes(item, spec.camera, spec.frames)
    return np.clip(boxes, 0, [spec.width, spec.height, spec.width, spec.height]).astype(np.float32)


def visible_share(
    item: ObjectSpec, camera: CameraSpec, frames: int, width: int, height: int
) -> npt.NDArray[np.float64]:
    """[F]: the share of an object's box that is inside the frame."""
    boxes = full_boxes(item, camera, frames)
    return _area(np.clip(boxes, 0, [width, height, width, height])) / _area(boxes)


def _area(boxes: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.clip(boxes[..., 2] - boxes[..., 0], 0, None) * np.clip(boxes[..., 3] - boxes[..., 1], 0, None)


def _draw_companion(
    rng: np.random.Generator, others: tuple[ObjectSpec, ...], size: float, share: float, dataset: MovingShapesDataset
) -> tuple[Companion, ObjectSpec]:
    """A companion of `others[0]`: with probability `share` one at its side that moves as it does, else one more distractor.

    Direction and distance to the named object do not depend on its motion, so that a single frame does not tell it by them. The
    companion may therefore be partly out of view. Growing and shrinking objects keep the ratio of their sizes, which tells them
    from others if `dataset.object_size` is a single size.

    Args:
        size: median side of `others[0]`, in units of the standard one.
    """
    named, its_size = others[0], _draw_size(rng, dataset)
    if rng.random() >= share:
        return "independent", _distractor(rng, its_size, others, dataset)
    appearance = _appearance(rng, unlike=named)
    its_size *= DISTRACTOR_SCALE
    path = _scaled(_path_in_step(rng, named.path, dataset), its_size)
    distance = _COMPANION_DISTANCE * SIDE * min(dataset.width, dataset.height) * (size + its_size)
    angle = rng.uniform(0, 2 * np.pi)
    x, y = named.path.x + distance * float(np.cos(angle)), named.path.y + distance * float(np.sin(angle))
    return "in step", ObjectSpec(*appearance, replace(path, x=x, y=y))


def _path_in_step(rng: np.random.Generator, path: PathSpec, dataset: MovingShapesDataset) -> PathSpec:
    """Another path of the same motion, as far and at the same time."""
    other = draw_path(rng, path.motion, dataset.width, dataset.height)
    return replace(other, travel=path.travel, phase=path.phase)


def _draw_part(rng: np.random.Generator, along: PathSpec | None, dataset: MovingShapesDataset) -> BackgroundPart:
    """A moving part of the background, in step with the path `along`, or with a motion of its own."""
    size = np.array([dataset.width, dataset.height])
    x, y = rng.uniform(0.2, 0.8, 2) * size
    radius_x, radius_y = rng.uniform(*_PART_RADIUS, 2) * size
    seed = int(rng.integers(2**31))
    own = draw_path(rng, str(rng.choice(list(MOTIONS))), dataset.width, dataset.height)
    path = own if along is None else _path_in_step(rng, along, dataset)
    return BackgroundPart(float(radius_x), float(radius_y), seed, replace(path, x=float(x), y=float(y)))


def part_boxes(spec: ClipSpec) -> npt.NDArray[np.float32]:
    """[F, 4]: the box of the moving part of the background, as `true_boxes`; [0, 4] without such a part."""
    if spec.part is None:
        return np.zeros((0, 4), np.float32)
    part, size = spec.part, [spec.width, spec.height]
    middle = np.array([part.path.x, part.path.y]) - camera_track(spec.camera, spec.frames)
    radii = np.array([part.radius_x, part.radius_y])
    return np.clip(np.hstack([middle - radii, middle + radii]), 0, [*size, *size]).astype(np.float32)


def _distractor(
    rng: np.random.Generator, size: float, others: tuple[ObjectSpec, ...], dataset: MovingShapesDataset
) -> ObjectSpec:
    """An object with an independent motion, placed to overlap the others least; `others[0]` is the named one."""
    shape, color, texture = _appearance(rng, unlike=others[0])
    motion = str(rng.choice(list(MOTIONS)))
    candidates = []
    for _ in range(_CANDIDATES):
        path = draw_path(rng, motion, dataset.width, dataset.height)
        # Anywhere in the frame: distractors need not stay in view.
        x, y = rng.uniform(0.1, 0.9, 2) * (dataset.width, dataset.height)
        path = replace(path, side=path.side * DISTRACTOR_SCALE * size, x=float(x), y=float(y))
        candidates.append(ObjectSpec(shape, color, texture, path))
    return min(candidates, key=lambda candidate: _overlap(candidate, others, dataset.frames))


def _overlap(candidate: ObjectSpec, others: tuple[ObjectSpec, ...], frames: int) -> float:
    """The mean area, in pixels, that a candidate's box shares with the others' boxes."""
    boxes, still = full_boxes(candidate, CameraSpec(), frames), CameraSpec()
    total = 0.0
    for other in others:
        theirs = full_boxes(other, still, frames)
        shared = np.concatenate(
            [np.maximum(boxes[:, :2], theirs[:, :2]), np.minimum(boxes[:, 2:], theirs[:, 2:])], axis=1
        )
        total += float(_area(shared).mean())
    return total
