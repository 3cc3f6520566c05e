"""Crops: VideoMAE's multi-scale crop by its description, and the others by their bounds."""

import numpy as np
import pytest
import torch
from torchvision.transforms import RandomResizedCrop

from stm.config import Augmentation
from stm.data.crop_boxes import center_crop, draw_crop, multi_scale_crop, random_resized_crop, side_crops

FRAMES = [(340, 256), (256, 340), (256, 256), (33, 32), (455, 256)]


@pytest.mark.parametrize(("width", "height"), FRAMES)
@pytest.mark.parametrize("kind", ["multi_scale", "random_resized", "center", "whole"])
def test_crops_lie_inside_the_frame(kind: str, width: int, height: int) -> None:
    augmentation = Augmentation.model_validate({"crop": kind, "scale": (0.08, 1.0)})
    generator = np.random.default_rng(0)
    for _ in range(300):
        box, _ = draw_crop(generator, augmentation, width, height)
        assert box.left >= 0 and box.top >= 0 and box.width > 0 and box.height > 0
        assert box.left + box.width <= width and box.top + box.height <= height


def test_multi_scale_draws_pairs_of_scales_at_most_one_step_apart_equally_often() -> None:
    scales = [int(256 * scale) for scale in (1, 0.875, 0.75, 0.66)]
    allowed = {(w, h) for i, w in enumerate(scales) for j, h in enumerate(scales) if abs(i - j) <= 1}
    assert len(allowed) == 10
    generator = np.random.default_rng(1)
    drawn = [multi_scale_crop(generator, 340, 256) for _ in range(10_000)]
    sizes = [(box.width, box.height) for box in drawn]
    assert set(sizes) == allowed
    share = np.array([sizes.count(size) for size in allowed]) / 10_000
    assert np.abs(share - 0.1).max() < 5 * np.sqrt(0.1 * 0.9 / 10_000)


def test_multi_scale_crops_lie_in_13_places() -> None:
    generator = np.random.default_rng(2)
    boxes = [multi_scale_crop(generator, 340, 256) for _ in range(5_000)]
    smallest = {(box.left, box.top) for box in boxes if (box.width, box.height) == (168, 168)}
    x, y = (340 - 168) // 4, (256 - 168) // 4
    corners_edges_centre = {(i * x, j * y) for i in (0, 2, 4) for j in (0, 2, 4)}
    assert smallest == corners_edges_centre | {(i * x, j * y) for i in (1, 3) for j in (1, 3)}


def test_random_resized_crops_keep_to_area_and_aspect() -> None:
    generator = np.random.default_rng(3)
    boxes = [random_resized_crop(generator, 340, 256, (0.3, 0.6)) for _ in range(1_000)]
    area = np.array([box.width * box.height / (340 * 256) for box in boxes])
    aspect = np.array([box.width / box.height for box in boxes])
    assert 0.29 < area.min() < 0.32 and 0.58 < area.max() < 0.61
    assert 0.74 < aspect.min() < 0.78 and 1.28 < aspect.max() < 1.35
    assert abs(np.log(aspect).mean()) < 0.03


@pytest.mark.parametrize(
    ("width", "height", "expected"),
    [
        (1000, 20, (486, 0, 27, 20)),  # round(20 * 4 / 3) columns of all rows
        (20, 1000, (0, 486, 20, 27)),
        (32, 30, (0, 0, 32, 30)),  # within 3:4 and 4:3: all of it
    ],
)
def test_a_random_resized_crop_that_cannot_fit_is_torchvisions(
    width: int, height: int, expected: tuple[int, int, int, int]
) -> None:
    # More than the frame's area never fits.
    assert random_resized_crop(np.random.default_rng(4), width, height, (1.5, 1.5)) == expected
    top, left, rows, columns = RandomResizedCrop.get_params(
        torch.empty(3, height, width), scale=[1.5, 1.5], ratio=[3 / 4, 4 / 3]
    )
    assert (left, top, columns, rows) == expected


def test_random_resized_crops_are_distributed_like_torchvisions() -> None:
    """Area, aspect ratio and position of crops of a wide frame, of which some attempts do not fit: means of 4,000 each."""
    generator, frame = np.random.default_rng(6), torch.empty(3, 256, 455)
    torch.manual_seed(6)
    ours = np.array([random_resized_crop(generator, 455, 256, (0.5, 1.0)) for _ in range(4_000)])
    theirs = np.array([RandomResizedCrop.get_params(frame, [0.5, 1.0], [3 / 4, 4 / 3]) for _ in range(4_000)])
    theirs = theirs[:, [1, 0, 3, 2]]
    error = np.sqrt(ours.var(axis=0) / 4_000 + theirs.var(axis=0) / 4_000)
    assert (np.abs(ours.mean(axis=0) - theirs.mean(axis=0)) < 4 * error).all()
    assert np.corrcoef(ours[:, 2], ours[:, 3])[0, 1] == pytest.approx(
        np.corrcoef(theirs[:, 2], theirs[:, 3])[0, 1], abs=0.08
    )


def test_half_the_samples_are_flipped_or_none() -> None:
    generator = np.random.default_rng(5)
    flips = [draw_crop(generator, Augmentation(flip=True), 80, 64)[1] for _ in range(2_000)]
    assert abs(np.mean(flips) - 0.5) < 5 * np.sqrt(0.25 / 2_000)
    assert not any(draw_crop(generator, Augmentation(flip=False), 80, 64)[1] for _ in range(50))


@pytest.mark.parametrize(("width", "height"), [(340, 256), (256, 340), (256, 256), (33, 32), (767, 256)])
def test_three_crops_cover_the_frame_and_nothing_else(width: int, height: int) -> None:
    covered = np.zeros((height, width), dtype=bool)
    side = min(width, height)
    for box in side_crops(3, width, height):
        assert (box.width, box.height) == (side, side) and box.left >= 0 and box.top >= 0
        part = covered[box.top : box.top + side, box.left : box.left + side]
        assert part.shape == (side, side)  # inside the frame
        part[:] = True
    assert covered.all()


def test_three_crops_lie_along_the_long_side_and_the_second_is_the_centre() -> None:
    assert [box.left for box in side_crops(3, 341, 256)] == [0, 42, 85]
    assert [box.top for box in side_crops(3, 256, 341)] == [0, 42, 85]
    for width, height in FRAMES:
        assert side_crops(3, width, height)[1] == center_crop(width, height) == side_crops(1, width, height)[0]
