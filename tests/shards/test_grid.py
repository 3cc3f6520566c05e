"""The grid of the maps."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stm.shards.grid import cell_edges, map_shape

sides = st.integers(1, 4096)


@given(width=sides, height=sides, grid=st.integers(2, 64))
def test_short_side_has_grid_cells_and_cells_are_nearly_square(width: int, height: int, grid: int) -> None:
    rows, columns = map_shape(width, height, grid)
    assert min(rows, columns) == grid
    assert (rows <= columns) == (height <= width) or rows == columns
    long, short = max(width, height), min(width, height)
    assert abs(max(rows, columns) - grid * long / short) <= 0.5


@given(width=sides, height=sides, grid=st.integers(2, 64))
def test_turning_the_frame_turns_the_map(width: int, height: int, grid: int) -> None:
    assert map_shape(height, width, grid) == map_shape(width, height, grid)[::-1]


@given(width=sides, height=sides, grid=st.integers(2, 20))
def test_cells_tile_the_frame_without_gap_or_overlap(width: int, height: int, grid: int) -> None:
    rows, columns = map_shape(width, height, grid)
    for length, cells in ((width, columns), (height, rows)):
        edges = cell_edges(length, cells)
        assert (edges[0], edges[-1]) == (0, pytest.approx(length))
        assert np.diff(edges) == pytest.approx(length / cells)


def test_known_shapes() -> None:
    assert map_shape(224, 224, 14) == (14, 14)
    assert map_shape(340, 256, 14) == (14, 19)
    assert map_shape(456, 256, 14) == (14, 25)
    assert map_shape(256, 456, 14) == (25, 14)
    assert cell_edges(10, 4).tolist() == [0, 2.5, 5, 7.5, 10]


def test_a_frame_without_pixels_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        map_shape(0, 10, 14)
