"""Optical flow between a clip's sampled frames, from the packed flow between its stored ones, in tokens of the crop."""

import numpy as np
from numpy.typing import NDArray

from stm.data.crop_boxes import Box
from stm.data.geometry import Geometry
from stm.data.guides.crop import crop_vectors
from stm.data.guides.maker import GuideMaker, Stored
from stm.shards.index import Clip


def flow_between(
    packed: NDArray[np.floating], first: int, positions: NDArray[np.int64], cells: int
) -> NDArray[np.float32]:
    """Forward and backward flow from each sampled frame to the next and to the previous one.

    A point is tracked step by step through the stored frames between them. The flow is zero between copies of a frame, which
    occur at the end of a short clip, and at both ends of the window: forward from the last frame, backward from the first.

    Args:
        packed: [2, stored frames, R, C, 2], forward and backward, x right and y down, in map cells.
        first: stored position of the first frame in `packed`.
        positions: the sampled frames, ascending.
        cells: flow cells per side of a map cell.

    Returns:
        float32 [2, frames, R, C, 2], in map cells.
    """
    taken = positions - first
    steps = np.diff(taken)
    result = np.zeros((2, len(taken), *packed.shape[2:]), dtype=np.float32)
    result[0, :-1] = follow(packed[0], taken[:-1], steps, 1, cells)
    result[1, 1:] = follow(packed[1], taken[1:], steps, -1, cells)
    return result


def follow(
    flow: NDArray[np.floating], starts: NDArray[np.int64], steps: NDArray[np.int64], direction: int, cells: int
) -> NDArray[np.float32]:
    """Displacement of the point at each cell's centre, from each frame in `starts` over the number of frames in `steps`.

    Args:
        flow: [frames, R, C, 2], to the next frame in `direction`, in map cells.
        direction: 1 or -1.

    Returns:
        float32 [starts, R, C, 2], in map cells.
    """
    moved = np.zeros((len(starts), *flow.shape[1:]), dtype=np.float32)
    for step in range(int(steps.max(initial=0))):
        active = np.flatnonzero(steps > step)
        fields = flow[starts[active] + direction * step].astype(np.float32)
        # The first step starts at the cells' centres, where the flow is stored, so no interpolation is needed.
        moved[active] += fields if step == 0 else look_up(fields, moved[active] * np.float32(cells))
    return moved


def look_up(fields: NDArray[np.float32], displacements: NDArray[np.float32]) -> NDArray[np.float32]:
    """Sample fields at their cells' centres plus the given displacements.

    Interpolates bilinearly between the four surrounding centres; beyond the outermost centres, their values are repeated.

    Args:
        fields, displacements: [P, R, C, 2]; displacements in cells of these fields.
    """
    count, rows, columns, _ = fields.shape
    x = np.clip(np.arange(columns, dtype=np.float32) + displacements[..., 0], 0, columns - 1)
    y = np.clip(np.arange(rows, dtype=np.float32)[:, None] + displacements[..., 1], 0, rows - 1)
    left, top = (np.floor(values).astype(np.int64) for values in (x, y))
    right, below = np.minimum(left + 1, columns - 1), np.minimum(top + 1, rows - 1)
    across, down = (x - left)[..., None], (y - top)[..., None]
    flat = fields.reshape(-1, 2)
    field = np.arange(count)[:, None, None] * rows
    upper, lower = (field + top) * columns, (field + below) * columns
    above = flat[upper + left] * (1 - across) + flat[upper + right] * across
    under = flat[lower + left] * (1 - across) + flat[lower + right] * across
    mixed: NDArray[np.float32] = above * (1 - down) + under * down
    return mixed


def crop_flow(
    flow: NDArray[np.floating], frame: tuple[int, int], box: Box, side: int, cells: int, flip: bool
) -> NDArray[np.float32]:
    """Convert flow on the full frame, in map cells, to flow on a crop, in the crop's tokens.

    Args:
        flow: [..., rows * cells, columns * cells, 2], covering the frame.
        frame: width and height of the frame, in pixels.
        box: the crop.
        side: tokens per side of the crop.
        cells: flow cells per side of a map cell, and of a token.
        flip: whether the crop is mirrored left to right.

    Returns:
        float32 [..., side * cells, side * cells, 2].
    """
    rows, columns = flow.shape[-3] // cells, flow.shape[-2] // cells
    # The size of a map cell in tokens of the crop, along x and y.
    scale = (frame[0] / columns * side / box.width, frame[1] / rows * side / box.height)
    return crop_vectors(flow, frame, box, side * cells, flip) * np.array(scale, dtype=np.float32)


def _make_flow(stored: Stored) -> NDArray[np.float32]:
    return flow_between(stored.values, 0, stored.taken, stored.clip.array_sizes["flow_cells"])


def _cut_flow(
    values: NDArray[np.floating], clip: Clip, box: Box, flip: bool, geometry: Geometry
) -> NDArray[np.float32]:
    """Crop the flow [2, T, R, C, 2] of the whole frame, in map cells, to that of the crop, in tokens."""
    return crop_flow(values, (clip.width, clip.height), box, geometry.side, clip.array_sizes["flow_cells"], flip)


FLOW = GuideMaker({"flow": _make_flow}, cut=_cut_flow)
