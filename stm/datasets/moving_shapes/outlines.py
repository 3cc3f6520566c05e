"""The outlines of the shapes of `moving-shapes`, and the boxes around them."""

from functools import cache

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "star", "cross", "ring", "heart")

RING_HOLE = 0.5  # radius of a ring's hole, as a share of its radius
_ROUND = 96  # vertices of a circular outline


@cache
def outline(shape: str) -> Array:
    """[K, 2]: the vertices of a shape with side 2, centred at the origin, y pointing down."""
    points = _OUTLINES[shape]()
    points.setflags(write=False)
    return points


def _circle() -> Array:
    return _polar(np.ones(_ROUND))


def _polar(radii: Array) -> Array:
    angles = 2 * np.pi * np.arange(len(radii)) / len(radii) - np.pi / 2
    return radii[:, None] * np.column_stack([np.cos(angles), np.sin(angles)])


def _square() -> Array:
    return 0.88 * np.array([[-1.0, -1], [1, -1], [1, 1], [-1, 1]])


def _triangle() -> Array:
    return _polar(np.full(3, 1.2))


def _star() -> Array:
    return _polar(np.tile([1.2, 0.52], 5))


def _cross() -> Array:
    arm, long = 0.36, 1.08
    quarter = np.array([[-arm, -long], [arm, -long], [arm, -arm]])
    turns = [np.array([[0.0, -1], [1, 0]]), np.array([[-1.0, 0], [0, -1]]), np.array([[0.0, 1], [-1, 0]])]
    return np.concatenate([quarter, *(quarter @ turn.T for turn in turns)])


def _heart() -> Array:
    t = 2 * np.pi * np.arange(_ROUND) / _ROUND
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.column_stack([x, y - 2.5]) / 15


_OUTLINES = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "ring": _circle,
    "heart": _heart,
}


def boxes_of(shape: str, places: Array) -> Array:
    """The axis-aligned bounding boxes of a shape over time.

    Args:
        places: [F, 4]: x and y of the centre, side in pixels, angle in radians.

    Returns:
        [F, 4]: x0, y0, x1, y1 in pixels.
    """
    cos, sin = np.cos(places[:, 3]), np.sin(places[:, 3])
    turns = np.stack([np.stack([cos, -sin], -1), np.stack([sin, cos], -1)], -2)  # [F, 2, 2]
    corners = np.einsum("fij,kj->fki", turns, outline(shape)) * (places[:, 2] / 2)[:, None, None]
    corners += places[:, None, :2]
    return np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)
