"""Crops guides like the pixels: from a map of the full frame to one value per token of the crop.

A map is piecewise constant: each of its rows x columns cells covers an equal part of the frame. A token's
value is the exact mean of that function over the token's rectangle, so a crop along the cells' edges returns the cells, and
any other crop returns area-weighted means of cells. Rectangles are products of intervals, so two small matrices suffice.

The similarity of overlapping windows is different: a cell has the value of a window that is larger than the cell, about as large
as a token. A token's value is then that of a window around its centre, interpolated bilinearly between the windows that are
stored. Their mean over the token would average over nearly twice the token's side (docs/masking.md has the numbers).
"""

from functools import lru_cache, partial

import numpy as np
from numpy.typing import NDArray

from stm.data.crop_boxes import Box


@lru_cache(maxsize=4096)  # a dataset has few frame sizes, and multi-scale crops have few sizes and positions
def overlap_matrix(start: float, length: float, total: float, cells: int, tokens: int) -> NDArray[np.float32]:
    """The fraction of each token that lies in each cell along one axis, float32 [tokens, cells], read-only; rows sum to 1.

    Args:
        start, length: the crop's interval, in pixels.
        total: length of the frame, in pixels.
        cells: number of equal cells that cover the frame.
        tokens: number of equal tokens that cover the crop's interval.
    """
    token_edges = start + length * np.arange(tokens + 1) / tokens
    cell_edges = total * np.arange(cells + 1) / cells
    low = np.maximum(token_edges[:-1, None], cell_edges[None, :-1])
    high = np.minimum(token_edges[1:, None], cell_edges[None, 1:])
    shares: NDArray[np.float32] = (np.clip(high - low, 0, None) * tokens / length).astype(np.float32)
    # Read-only, because callers share the cached array.
    shares.flags.writeable = False
    return shares


@lru_cache(maxsize=4096)
def interpolation_matrix(
    start: float, length: float, total: float, cells: int, tokens: int, window: int
) -> NDArray[np.float32]:
    """The weight of each cell's window in each token along one axis, float32 [tokens, cells], read-only; rows sum to 1.

    A token's centre lies between the centres of two windows, which are weighted linearly; beyond the outermost windows, these
    count alone.

    Args:
        start, length, total, cells, tokens: as for `overlap_matrix`.
        window: cells per window; see `stm.preprocess.similarity.patch_scorer.spread_windows` for their places.
    """
    first, last = (window - 1) // 2, cells - 1 - window // 2
    centres = (start + length * (np.arange(tokens) + 0.5) / tokens) * cells / total
    places = np.clip(centres - window / 2 + first, first, last)
    shares = np.maximum(0, 1 - np.abs(places[:, None] - np.arange(cells))).astype(np.float32)
    shares.flags.writeable = False
    return shares


def crop_map(
    values: NDArray[np.floating], frame: tuple[int, int], box: Box, side: int, flip: bool, window: int = 1
) -> NDArray[np.float32]:
    """Resample a map of the full frame to the crop's token grid.

    Args:
        values: [..., rows, columns], covering the frame.
        frame: width and height of the frame, in pixels.
        box: the crop.
        side: tokens per side of the crop.
        flip: whether the crop is mirrored left to right.
        window: cells per side of the overlapping windows that the values belong to; 1: the values are those of cells.

    Returns:
        float32 [..., side, side].
    """
    matrix = overlap_matrix if window == 1 else partial(interpolation_matrix, window=window)
    rows = matrix(box.top, box.height, frame[1], values.shape[-2], side)
    columns = matrix(box.left, box.width, frame[0], values.shape[-1], side)
    cropped = rows @ values.astype(np.float32) @ columns.T
    return np.ascontiguousarray(cropped[..., ::-1]) if flip else cropped


def crop_vectors(
    values: NDArray[np.floating], frame: tuple[int, int], box: Box, side: int, flip: bool
) -> NDArray[np.float32]:
    """`crop_map` for vectors [..., rows, columns, 2] (x right, y down); mirroring negates x."""
    parts = [crop_map(values[..., axis], frame, box, side, flip) for axis in (0, 1)]
    return np.stack([-parts[0] if flip else parts[0], parts[1]], axis=-1)


def pool_slots(values: NDArray[np.float32], tubelet: int) -> NDArray[np.float32]:
    """Mean over each tubelet's frames: [frames, side, side] -> [slots, side * side]."""
    return values.reshape(-1, tubelet, values.shape[-2] * values.shape[-1]).mean(axis=1, dtype=np.float32)
