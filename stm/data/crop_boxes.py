"""Crop boxes on the stored frame. One box and one flip apply to all frames and guides of a sample."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from stm.config import Augmentation

# VideoMAE's MultiScaleCrop: sides as shares of the frame's short side.
SCALES = (1.0, 0.875, 0.75, 0.66)

# Positions of a multi-scale crop, in quarters of the free width and height: the corners, the midpoints of the edges, the
# centre, and half-way between the centre and the corners.
PLACES = tuple((x, y) for x in (0, 2, 4) for y in (0, 2, 4)) + tuple((x, y) for x in (1, 3) for y in (1, 3))


class Box(NamedTuple):
    """A crop, in whole pixels of the stored frame."""

    left: int
    top: int
    width: int
    height: int


def center_crop(width: int, height: int) -> Box:
    """The largest centred square of a frame."""
    side = min(width, height)
    return Box((width - side) // 2, (height - side) // 2, side, side)


def whole_frame(width: int, height: int) -> Box:
    """The whole frame: resizing to a square then squashes it."""
    return Box(0, 0, width, height)


def side_crops(crops: int, width: int, height: int) -> list[Box]:
    """Square crops for evaluation, with the frame's short side: the centre, or three evenly spaced along the long side.

    The three are the left, centre and right crops, or the top, centre and bottom ones of a portrait frame. They cover the
    frame if its long side is at most three times the short one, and coincide if it is square.
    """
    if crops == 1:
        return [center_crop(width, height)]
    side = min(width, height)
    return [
        Box((width - side) * place // (crops - 1), (height - side) * place // (crops - 1), side, side)
        for place in range(crops)
    ]


def multi_scale_crop(generator: np.random.Generator, width: int, height: int) -> Box:
    """VideoMAE's crop: the scales of width and height are at most one step apart; the position is one of 13 fixed ones.

    Unlike in VideoMAE, a side within 2 pixels of the image size is not rounded to it.
    """
    sides = [int(min(width, height) * scale) for scale in SCALES]
    steps = range(len(sides))
    # Adjacent scales at most, as in VideoMAE: the crop's aspect ratio stays between 0.86 and 1.17.
    pairs = [(sides[i], sides[j]) for i in steps for j in steps if abs(i - j) <= 1]
    crop_width, crop_height = pairs[generator.integers(len(pairs))]
    x, y = PLACES[generator.integers(len(PLACES))]
    return Box((width - crop_width) // 4 * x, (height - crop_height) // 4 * y, crop_width, crop_height)


def random_resized_crop(
    generator: np.random.Generator,
    width: int,
    height: int,
    scale: tuple[float, float],
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Box:
    """A crop of uniform area, log-uniform aspect ratio and uniform position, as torchvision's RandomResizedCrop samples it.

    If 10 attempts do not fit, it is the largest centred crop whose aspect ratio is in range: usually the whole frame.

    Args:
        scale: minimum and maximum share of the frame's area.
        ratio: minimum and maximum aspect ratio, width / height.
    """
    for _ in range(10):
        area = generator.uniform(*scale) * width * height
        aspect = math.exp(generator.uniform(math.log(ratio[0]), math.log(ratio[1])))
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left = int(generator.integers(width - crop_width + 1))
            return Box(left, int(generator.integers(height - crop_height + 1)), crop_width, crop_height)
    aspect = min(max(width / height, ratio[0]), ratio[1])
    crop_width, crop_height = min(width, round(height * aspect)), min(height, round(width / aspect))
    return Box((width - crop_width) // 2, (height - crop_height) // 2, crop_width, crop_height)


def draw_crop(generator: np.random.Generator, augmentation: Augmentation, width: int, height: int) -> tuple[Box, bool]:
    """Sample a training crop of a frame of `width` x `height` pixels, and whether to flip it."""
    drawers: dict[str, Callable[[], Box]] = {
        "multi_scale": lambda: multi_scale_crop(generator, width, height),
        "random_resized": lambda: random_resized_crop(generator, width, height, augmentation.scale),
        "center": lambda: center_crop(width, height),
        "whole": lambda: whole_frame(width, height),
    }
    box = drawers[augmentation.crop]()
    return box, augmentation.flip and bool(generator.random() < 0.5)
