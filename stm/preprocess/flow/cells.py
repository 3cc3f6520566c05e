"""Averaging per-pixel flow over the cells in which it is stored."""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


@lru_cache(maxsize=64)
def average_weights(length: int, cells: int) -> NDArray[np.float32]:
    """Return weights that average `length` pixels into `cells` equal cells by area: float32 [cells, length].

    A pixel that straddles a border contributes to both cells, in proportion to the overlap; each row sums to 1.
    """
    edges = np.arange(cells + 1) * (length / cells)
    pixels = np.arange(length)
    shares = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return (np.clip(shares, 0, None) * (cells / length)).astype(np.float32)


def to_cells(flow: NDArray[np.float32], rows: int, columns: int, cells: int) -> NDArray[np.float16]:
    """Average flow over cells, and convert it from pixels to units of the map's cell width and height.

    Args:
        flow: float32 [H, W, 2] in pixels; x points right, y down.
        rows, columns: size of the map, in cells.
        cells: flow cells per side of a map cell.

    Returns:
        float16 [rows * cells, columns * cells, 2].
    """
    height, width = flow.shape[:2]
    down = average_weights(height, rows * cells)
    across = average_weights(width, columns * cells)
    mean = np.stack([down @ flow[..., axis] @ across.T for axis in (0, 1)], axis=-1)
    # In cells rather than pixels, because training resizes the frames and a displacement in cells is valid at any size.
    return (mean * np.array([columns / width, rows / height], np.float32)).astype(np.float16)
