"""The frames agree with the ground truth."""

from dataclasses import replace

import cv2
import numpy as np
import pytest

from stm.config import MovingShapesDataset
from stm.datasets.moving_shapes.clip_spec import BackgroundPart, ClipSpec, part_boxes
from stm.datasets.moving_shapes.generate import BACKGROUNDS, draw_clip_spec, render_clip
from stm.datasets.moving_shapes.motions import PathSpec, track

DATASET = MovingShapesDataset(source="moving-shapes", moving_camera=0.5)


def clip(index: int, **changes: object) -> ClipSpec:
    return draw_clip_spec(3, "train", index, DATASET.model_copy(update=changes))


def without_named(spec: ClipSpec) -> ClipSpec:
    far = replace(spec.named.path, x=-1000.0, y=-1000.0)
    return replace(spec, named=replace(spec.named, path=far))


@pytest.mark.parametrize("index", range(14))
def test_boxes_hold_exactly_the_pixels_that_the_named_object_changes(index: int) -> None:
    spec = clip(index)
    shown, bare = render_clip(spec), render_clip(without_named(spec))
    for frame in range(0, spec.frames, 5):
        changed = np.abs(shown.frames[frame].astype(int) - bare.frames[frame]).max(axis=2) > 24
        rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
        measured = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        np.testing.assert_allclose(measured, shown.boxes[frame], atol=2.0)


def pixels_changed(one: np.ndarray, other: np.ndarray, threshold: int = 24) -> list[int]:
    """The box around the pixels in which two frames differ: x0, y0, x1, y1."""
    changed = np.abs(one.astype(int) - other).max(axis=2) > threshold
    rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
    return [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


REAL = {"companion": 1.0, "object_size": (0.12, 0.6), "moving_camera": 1.0, "distractors": 0}


@pytest.mark.parametrize("index", range(6))
def test_the_boxes_of_a_companion_are_those_of_the_companion_rendered_alone(index: int) -> None:
    spec = clip(index, **REAL, moving_background=0.5)
    shown = render_clip(spec, which=[0, 15, 31])
    alone = render_clip(replace(without_named(spec)), which=[0, 15, 31])
    bare = render_clip(replace(without_named(spec), distractors=()), which=[0, 15, 31])
    assert shown.distractor_boxes.shape == (1, 3, 4)
    for frame, box in enumerate(shown.distractor_boxes[0]):
        if (box[2:] - box[:2] > 4).all():  # in view
            np.testing.assert_allclose(pixels_changed(alone.frames[frame], bare.frames[frame]), box, atol=2.0)


def test_a_moving_part_changes_only_its_own_box_and_moves_while_the_rest_stands() -> None:
    for index in range(6):
        spec = clip(index, moving_background=1.0, moving_camera=0.0, distractors=0)
        plain = replace(without_named(spec), part=None)
        with_part, without = render_clip(replace(plain, part=spec.part)).frames, render_clip(plain).frames
        x0, y0, x1, y1 = part_boxes(spec)[0]
        found = pixels_changed(with_part[0], without[0], threshold=0)
        assert found[0] >= x0 - 1 and found[1] >= y0 - 1 and found[2] <= x1 + 1 and found[3] <= y1 + 1
        np.testing.assert_allclose(found, [x0, y0, x1, y1], atol=6)  # the texture may be alike at the rim
        assert (np.diff(without.astype(int), axis=0) == 0).all()
        changes = np.abs(np.diff(with_part.astype(int), axis=0)).max(axis=3) > 8
        assert changes.mean() > 0.01


@pytest.mark.parametrize("motion", ["drift_right", "grow", "spin_clockwise"])
def test_the_texture_of_a_moving_part_moves_as_an_object_does(motion: str) -> None:
    """The last frame, taken back along the path by the inverse of the object's own motion, shows the first one."""
    path = PathSpec(motion, x=80, y=64, side=0.34 * 128, angle=0.3, travel=25, phase=0.0)
    plain = without_named(clip(0, moving_camera=0.0, distractors=0, frames=8))
    spec = replace(plain, background="stone", part=BackgroundPart(70.0, 60.0, 1, path))
    frames = render_clip(spec).frames.astype(np.float32)
    (x0, y0, side0, angle0), (x1, y1, side1, angle1) = track(path, 8)[[3, 4]]
    turn = cv2.getRotationMatrix2D((x0 - 0.5, y0 - 0.5), -np.degrees(angle1 - angle0), side1 / side0)
    turn[:, 2] += [x1 - x0, y1 - y0]
    moved = cv2.warpAffine(frames[3], turn, (160, 128))
    inner = (slice(44, 84), slice(60, 100))
    agreement = np.corrcoef(moved[inner].ravel(), frames[4][inner].ravel())[0, 1]
    unmoved = np.corrcoef(frames[3][inner].ravel(), frames[4][inner].ravel())[0, 1]
    assert agreement > 0.95 > 0.8 > unmoved


def test_boxes_are_clipped_and_their_shapes_are_as_stated() -> None:
    spec = next(s for s in (clip(i, distractors=4) for i in range(50)) if len(s.distractors) == 4)
    rendered = render_clip(spec)
    assert rendered.frames.shape == (32, 128, 160, 3) and rendered.frames.dtype == np.uint8
    assert rendered.boxes.shape == (32, 4) and rendered.boxes.dtype == np.float32
    assert rendered.distractor_boxes.shape == (4, 32, 4) and rendered.distractor_boxes.dtype == np.float32
    for boxes in (rendered.boxes, rendered.distractor_boxes):
        assert (boxes >= 0).all() and (boxes <= [160, 128, 160, 128]).all()
        assert (boxes[..., 2:] >= boxes[..., :2]).all()
    assert render_clip(replace(spec, distractors=())).distractor_boxes.shape == (0, 32, 4)


def test_a_frame_rendered_alone_is_the_same() -> None:
    for index in range(12):  # one of each class
        spec = clip(index)
        whole, some = render_clip(spec), render_clip(spec, which=[20, 3])
        np.testing.assert_array_equal(some.frames, whole.frames[[20, 3]])
        np.testing.assert_array_equal(some.boxes, whole.boxes[[20, 3]])


def test_rendering_twice_gives_the_same_pixels() -> None:
    np.testing.assert_array_equal(render_clip(clip(4)).frames, render_clip(clip(4)).frames)


def test_a_resting_camera_changes_pixels_only_near_objects_and_a_moving_one_everywhere() -> None:
    def share_changed(spec: ClipSpec) -> float:
        frames = render_clip(replace(spec, distractors=())).frames.astype(int)
        return float((np.abs(np.diff(frames, axis=0)).max(axis=3) > 8).mean())

    resting = [share_changed(clip(i, moving_camera=0.0)) for i in range(4)]
    moving = [share_changed(clip(i, moving_camera=1.0)) for i in range(4)]
    assert max(resting) < 0.15 < 0.3 < min(moving)
    assert min(resting) > 0.002  # and something does move


def test_the_backgrounds_are_textured_and_differ() -> None:
    means = []
    for background in BACKGROUNDS:
        image = render_clip(replace(clip(0), background=background, distractors=()), which=[0]).frames[0].astype(float)
        assert image.mean(axis=2).std() > 8
        means.append(image.mean(axis=(0, 1)))
    gaps = [np.abs(a - b).max() for i, a in enumerate(means) for b in means[:i]]
    assert min(gaps) > 8


@pytest.mark.parametrize(("width", "height", "frames"), [(64, 64, 8), (66, 200, 9), (400, 64, 12)])
def test_other_sizes_work(width: int, height: int, frames: int) -> None:
    for index in range(6):
        rendered = render_clip(clip(index, width=width, height=height, frames=frames, distractors=8))
        assert rendered.frames.shape == (frames, height, width, 3)
        area = (rendered.boxes[:, 2] - rendered.boxes[:, 0]) * (rendered.boxes[:, 3] - rendered.boxes[:, 1])
        assert (area > 0.02 * min(width, height) ** 2).all()
