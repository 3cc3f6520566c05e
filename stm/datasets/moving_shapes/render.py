"""Renders the clips of `moving-shapes`: a `ClipSpec` becomes frames and ground-truth boxes."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
import numpy.typing as npt

from stm.datasets.moving_shapes.backgrounds import draw_background
from stm.datasets.moving_shapes.clip_spec import COLORS, BackgroundPart, ClipSpec, ObjectSpec, true_boxes
from stm.datasets.moving_shapes.motions import SIDE, ZOOM, camera_track, track
from stm.datasets.moving_shapes.outlines import RING_HOLE, outline

_WARP = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
_REACH = 1.35  # half of a sprite's side, in units of half the object's side: no outline extends further from the centre
# Sprites are drawn at four times the resolution and averaged, which antialiases their outlines.
_OVERSAMPLE = 4
_RIM = 0.05  # width of the dark rim, as a share of the side
_DARK = 0.38  # brightness of a texture's second tone


@dataclass(frozen=True)
class RenderedClip:
    """The frames of a clip and the ground-truth boxes of its objects. F: frames, M: distractors, a companion first."""

    frames: npt.NDArray[np.uint8]  # [F, H, W, 3] RGB
    boxes: npt.NDArray[np.float32]  # [F, 4] of the named object: x0, y0, x1, y1 in pixels, clipped to the frame
    distractor_boxes: npt.NDArray[np.float32]  # [M, F, 4]


def render_clip(spec: ClipSpec, which: Sequence[int] | None = None) -> RenderedClip:
    """Renders a clip.

    Args:
        which: indices of the frames to render; F is their number; None: all frames.
    """
    numbers = np.arange(spec.frames) if which is None else np.asarray(which, np.int64)
    camera = camera_track(spec.camera, spec.frames)[numbers]
    frames = _pan(spec, camera)
    if spec.part is not None:
        _paint_part(frames, spec, spec.part, track(spec.part.path, spec.frames)[numbers], camera)
    for item in (*spec.distractors, spec.named):  # the named object last, so that nothing occludes it
        places = track(item.path, spec.frames)
        # The sprite's resolution is derived from the whole clip, so that a frame rendered alone is identical.
        resolution = 8 * int(np.ceil(places[:, 2].max() * _REACH / 8))
        places = places[numbers]
        places[:, :2] -= camera
        _paint(frames, item, places, resolution)
    others = [true_boxes(item, spec)[numbers] for item in spec.distractors]
    distractor_boxes = np.stack(others) if others else np.zeros((0, len(numbers), 4), np.float32)
    return RenderedClip(frames, true_boxes(spec.named, spec)[numbers], distractor_boxes)


def _paint_part(
    frames: npt.NDArray[np.uint8],
    spec: ClipSpec,
    part: BackgroundPart,
    places: npt.NDArray[np.float64],
    camera: npt.NDArray[np.float64],
) -> None:
    """Paints the moving part of the background into each frame.

    Args:
        places: [F, 4] x, y, side, angle of the texture, for a fixed camera; the texture is unscaled at an object's median side.
        camera: [F, 2] displacement in pixels.
    """
    texture, median = _part_texture(spec, part), SIDE * min(spec.width, spec.height)
    height, width = frames.shape[1:3]
    y, x = np.mgrid[:height, :width].astype(np.float32) + np.float32(0.5)
    for frame, place, moved in zip(frames, places, camera, strict=True):
        middle = np.array([part.path.x, part.path.y]) - moved
        inside = ((x - middle[0]) / part.radius_x) ** 2 + ((y - middle[1]) / part.radius_y) ** 2 < 1
        cos, sin = np.cos(place[3]), np.sin(place[3])
        turn = np.array([[cos, sin], [-sin, cos]]) * median / place[2]
        inverse = np.column_stack([turn, (len(texture) - 1) / 2 - turn @ (place[:2] - moved - 0.5)])
        np.copyto(frame, cv2.warpAffine(texture, inverse, (width, height), flags=_WARP), where=inside[..., None])


def _part_texture(spec: ClipSpec, part: BackgroundPart) -> npt.NDArray[np.uint8]:
    """[S, S, 3]: a texture that fills the part wherever its path takes it."""
    reach = (max(part.radius_x, part.radius_y) + np.sqrt(2) * part.path.travel) * np.exp(ZOOM)
    side = 2 * int(np.ceil(reach)) + 4
    return draw_background(spec.background, part.seed, side, side, _unit(spec))


def _unit(spec: ClipSpec) -> float:
    """Feature size of the background in pixels."""
    return min(spec.width, spec.height) / 10


def _pan(spec: ClipSpec, camera: npt.NDArray[np.float64]) -> npt.NDArray[np.uint8]:
    """[F, H, W, 3]: the background seen by the camera, cropped from a larger one that covers the camera's motion."""
    margin = [int(np.ceil(a)) + 2 for a in spec.camera.amplitude]
    world = draw_background(
        spec.background, spec.background_seed, spec.width + 2 * margin[0], spec.height + 2 * margin[1], _unit(spec)
    )
    frames = np.empty((len(camera), spec.height, spec.width, 3), np.uint8)
    for frame, (right, down) in zip(frames, camera, strict=True):
        shift = np.array([[1, 0, margin[0] + right], [0, 1, margin[1] + down]])
        cv2.warpAffine(world, shift, (spec.width, spec.height), frame, cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)
    return frames


def _paint(frames: npt.NDArray[np.uint8], item: ObjectSpec, places: npt.NDArray[np.float64], resolution: int) -> None:
    """Paints an object into each frame. places: [F, 4] x, y, side, angle."""
    sprite = _sprite(item.shape, item.color, item.texture, resolution)
    height, width = frames.shape[1:3]
    for frame, (x, y, side, angle) in zip(frames, places, strict=True):
        reach = side * _REACH / 2
        left, top = max(int(x - reach), 0), max(int(y - reach), 0)
        right, bottom = min(int(x + reach) + 2, width), min(int(y + reach) + 2, height)
        if right <= left or bottom <= top:
            continue
        inverse = _to_sprite(x - left, y - top, side, angle, resolution)
        patch = cv2.warpAffine(sprite, inverse, (right - left, bottom - top), flags=_WARP)
        window = frame[top:bottom, left:right]
        window[:] = (patch[..., :3] + window * (1 - patch[..., 3:]) + 0.5).astype(np.uint8)


def _to_sprite(x: float, y: float, side: float, angle: float, resolution: int) -> npt.NDArray[np.float64]:
    """[2, 3]: affine transform from window pixels to sprite pixels; pixel centres are at integer coordinates."""
    scale = resolution / (side * _REACH)
    turn = scale * np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    middle = (resolution - 1) / 2
    return np.column_stack([turn, [middle, middle] - turn @ [x - 0.5, y - 0.5]])


@lru_cache(maxsize=512)
def _sprite(shape: str, color: str, texture: str, resolution: int) -> npt.NDArray[np.float32]:
    """[resolution, resolution, 4]: premultiplied colors (0 to 255) and coverage (0 to 1)."""
    fine = resolution * _OVERSAMPLE
    mask = _fill(shape, fine)
    rim = max(1, round(_RIM * fine / _REACH))
    inner = cv2.erode(mask, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * rim + 1, 2 * rim + 1)))
    bright = np.array(COLORS[color], np.float32)
    image = np.where(_second_tone(texture, fine)[..., None], bright * _DARK, bright)
    image *= (inner > 0)[..., None]
    image += 14.0 * ((mask > 0) & (inner == 0))[..., None]  # the rim is nearly black
    # Premultiplied by coverage: averaging and warping would otherwise blend in the black outside the outline.
    premultiplied = np.dstack([image, (mask > 0).astype(np.float32)]).astype(np.float32)
    return np.asarray(cv2.resize(premultiplied, (resolution, resolution), interpolation=cv2.INTER_AREA))


def _fill(shape: str, side: int) -> npt.NDArray[np.uint8]:
    mask = np.zeros((side, side), np.uint8)
    corners = outline(shape)
    scale = side / (2 * _REACH)
    cv2.fillPoly(mask, [np.round(corners * scale + (side - 1) / 2).astype(np.int32)], 255)
    if shape == "ring":
        cv2.fillPoly(mask, [np.round(RING_HOLE * corners * scale + (side - 1) / 2).astype(np.int32)], 0)
    return mask


def _second_tone(texture: str, side: int) -> npt.NDArray[np.bool_]:
    """[side, side]: True where a texture is dark. The texture rotates and scales with its object."""
    axis = (np.arange(side) + 0.5) / side * 2 * _REACH - _REACH
    x, y = axis[None, :], axis[:, None]
    if texture == "striped":
        return np.broadcast_to((x * 2 + 0.25) % 1 < 0.5, (side, side))
    if texture == "checkered":
        return np.asarray((np.floor(x * 2.6 + 0.5) + np.floor(y * 2.6 + 0.5)) % 2 == 0)
    if texture == "dotted":
        row = np.floor(y * 1.8)
        return np.asarray(np.hypot((x * 1.8 + 0.5 * (row % 2)) % 1 - 0.5, (y * 1.8) % 1 - 0.5) < 0.3)
    return np.broadcast_to(x > 0, (side, side))  # two-tone
