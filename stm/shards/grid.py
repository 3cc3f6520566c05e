"""The grid of the similarity and motion maps: the number of cells per frame and the positions of their edges."""

import numpy as np
from numpy.typing import NDArray


def map_shape(width: int, height: int, grid: int) -> tuple[int, int]:
    """Rows and columns of a map over a frame of `width` x `height` pixels.

    The short side has `grid` cells. The long side has the number of cells that makes the cells as close to square as possible
    while they cover the frame exactly. Over the whole long side, the deviation is at most half a cell.

    Raises:
        ValueError: a side or `grid` is less than 1.

    >>> map_shape(340, 256, 14)
    (14, 19)
    """
    if min(width, height, grid) < 1:
        raise ValueError(f"a map needs a frame and a grid of at least 1; got {width} x {height} pixels, grid {grid}")
    short, long = sorted((width, height))
    # Rounds half up, in integer arithmetic: Python's round() would turn 2.5 into 2 and 3.5 into 4.
    along = max(grid, (2 * grid * long + short) // (2 * short))
    return (grid, along) if width >= height else (along, grid)


def cell_edges(length: float, cells: int) -> NDArray[np.float64]:
    """The `cells` + 1 edges that divide `length` pixels into equal parts, float64."""
    return np.arange(cells + 1, dtype=np.float64) * (length / cells)
