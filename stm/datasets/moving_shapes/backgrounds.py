"""The textured backgrounds of `moving-shapes`, in dull colors; the objects have bright ones."""

from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

Image = npt.NDArray[np.float32]

_MORTAR = np.array([172, 164, 156], np.float32)
_SEAM = np.array([52, 34, 20], np.float32)


def draw_background(name: str, seed: int, width: int, height: int, unit: float) -> npt.NDArray[np.uint8]:
    """Draws a background.

    Args:
        width, height: pixels.
        unit: feature size in pixels; for example, the approximate height of a brick.

    Returns:
        [height, width, 3] uint8 RGB.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    image = _PAINTERS[name](rng, width, height, unit)
    image *= np.float32(rng.uniform(0.88, 1.08))
    image += rng.normal(0, 3, (height, width, 1)).astype(np.float32)
    return np.clip(image, 0, 255).astype(np.uint8)


def _noise(rng: np.random.Generator, width: int, height: int, cell_x: float, cell_y: float) -> Image:
    """[height, width]: smooth noise, approximately in [-1, 1], with bumps of width cell_x and height cell_y."""
    grid = rng.uniform(-1, 1, (int(height / cell_y) + 3, int(width / cell_x) + 3)).astype(np.float32)
    smooth = cv2.resize(grid, None, fx=max(cell_x, 1.0), fy=max(cell_y, 1.0), interpolation=cv2.INTER_CUBIC)
    return np.asarray(smooth[:height, :width], np.float32)


def _axes(rng: np.random.Generator, width: int, height: int) -> tuple[Image, Image]:
    """x [1, width] and y [height, 1] in pixels, from a random origin."""
    start = rng.uniform(0, 1000, 2)
    x = np.arange(width, dtype=np.float32)[None] + np.float32(start[0])
    return x, np.arange(height, dtype=np.float32)[:, None] + np.float32(start[1])


def _mix(low: tuple[int, int, int], high: tuple[int, int, int], share: npt.NDArray[Any]) -> Image:
    """Colors interpolated between `low` and `high`; share: [h, w], in [0, 1]."""
    bottom, top = np.array(low, np.float32), np.array(high, np.float32)
    return np.asarray(bottom + (top - bottom) * np.clip(share, 0, 1)[..., None], np.float32)


def _table(rng: np.random.Generator, rows: Image, columns: Image) -> Image:
    """A random number in [0, 1] per cell (row, column), the same for all pixels of the cell."""
    numbers = rng.random(4096).astype(np.float32)
    # A hash of the cell: both factors are coprime to the table's size, so that neighbours get different entries.
    cells = rows.astype(np.int64) * 131 + columns.astype(np.int64) * 17
    return np.asarray(numbers[cells % 4096], np.float32)


def _brick(rng: np.random.Generator, width: int, height: int, unit: float) -> Image:
    x, y = _axes(rng, width, height)
    high, wide = unit, unit * 2.2
    row = np.floor(y / high)
    along = x / wide + 0.5 * (row % 2)
    joint = (y % high < unit * 0.14) | ((along % 1) * wide < unit * 0.14)
    tone = 0.75 * _table(rng, row + 0 * x, np.floor(along)) + 0.15 * _noise(rng, width, height, 3, 3)
    return np.where(joint[..., None], _MORTAR, _mix((104, 58, 46), (150, 92, 74), tone))


def _grass(rng: np.random.Generator, width: int, height: int, unit: float) -> Image:
    blades = _noise(rng, width, height, unit * 0.12, unit * 0.8)
    blades += _noise(rng, width, height, unit * 0.16, unit * 0.5)
    tone = 0.5 + 0.38 * blades + 0.18 * _noise(rng, width, height, unit * 2, unit * 2)
    return _mix((32, 58, 26), (96, 128, 60), tone)


def _wood(rng: np.random.Generator, width: int, height: int, unit: float) -> Image:
    x, y = _axes(rng, width, height)
    plank = np.floor(y / (unit * 1.6))
    seam = y % (unit * 1.6) < unit * 0.1
    grain = _noise(rng, width, height, unit * 3, unit * 0.16)
    grain += 0.5 * _noise(rng, width, height, unit * 2, unit * 0.1)
    tone = 0.45 + 0.28 * grain + 0.5 * (_table(rng, plank + 0 * x, plank + 0 * x) - 0.5)
    return np.where(seam[..., None], _SEAM, _mix((94, 64, 38), (164, 122, 80), tone))


def _water(rng: np.random.Generator, width: int, height: int, unit: float) -> Image:
    x, y = _axes(rng, width, height)
    bend = unit * 0.8 * _noise(rng, width, height, unit * 2, unit * 1.5)
    waves = np.sin((y + bend) * (2 * np.pi / (unit * 0.8)))
    waves = waves + 0.6 * np.sin((0.5 * x + y - bend) * (2 * np.pi / unit))
    return _mix((28, 54, 84), (112, 150, 176), 0.42 + 0.26 * waves)


def _sand(rng: np.random.Generator, width: int, height: int, unit: float) -> Image:
    x, y = _axes(rng, width, height)
    bend = unit * 0.9 * _noise(rng, width, height, unit * 3, unit * 2)
    ripples = np.sin((x * 0.25 + y + bend) * (2 * np.pi / (unit * 1.1)))
    grain = rng.normal(0, 0.16, (height, width)).astype(np.float32)
    return _mix((150, 128, 92), (206, 186, 148), 0.5 + 0.28 * ripples + grain)


def _stone(rng: np.random.Generator, width: int, height: int, unit: float) -> Image:
    """Cells around the jittered points of a grid (Worley noise), dark along the boundaries between cells."""
    cell = unit * 1.3
    rows, columns = int(height / cell) + 4, int(width / cell) + 4
    points = rng.uniform(0.1, 0.9, (rows, columns, 2)).astype(np.float32)
    tones = rng.random((rows, columns)).astype(np.float32)
    y, x = np.indices((height, width), np.float32) / np.float32(cell) + 1
    row, column = y.astype(np.int64), x.astype(np.int64)
    first, second = np.full((2, height, width), np.inf, np.float32)
    tone = np.zeros((height, width), np.float32)
    for down, right in ((a, b) for a in (-1, 0, 1) for b in (-1, 0, 1)):
        point = points[row + down, column + right]
        distance = np.hypot(row + down + point[..., 0] - y, column + right + point[..., 1] - x)
        nearer = distance < first
        second = np.where(nearer, first, np.minimum(second, distance))
        tone = np.where(nearer, tones[row + down, column + right], tone)
        first = np.minimum(first, distance)
    gap = np.clip((second - first) * 6, 0, 1)
    grain = 0.12 * _noise(rng, width, height, 3, 3)
    return _mix((52, 52, 56), (150, 148, 144), gap * (0.4 + 0.5 * tone + grain))


_PAINTERS = {"brick": _brick, "grass": _grass, "wood": _wood, "water": _water, "sand": _sand, "stone": _stone}
