"""Cutting maps, against exact rational arithmetic and against the pixels."""

from fractions import Fraction

import numpy as np
import pytest

from stm.data.crop_boxes import Box
from stm.data.guides.crop import crop_map, crop_vectors, overlap_matrix, pool_slots
from stm.data.guides.motion import motion_between


def integrate_exactly(values: np.ndarray, frame: tuple[int, int], box: Box, side: int) -> np.ndarray:
    """The mean of the piecewise-constant map over each token, by rational arithmetic over all pairs of rectangles."""
    rows, columns = values.shape
    width, height = frame

    def overlap(a: Fraction, b: Fraction, c: Fraction, d: Fraction) -> Fraction:
        return max(Fraction(0), min(b, d) - max(a, c))

    result = np.zeros((side, side))
    for i in range(side):
        top, bottom = (box.top + Fraction(box.height * k, side) for k in (i, i + 1))
        for j in range(side):
            left, right = (box.left + Fraction(box.width * k, side) for k in (j, j + 1))
            total = Fraction(0)
            for r in range(rows):
                vertical = overlap(top, bottom, Fraction(height * r, rows), Fraction(height * (r + 1), rows))
                for c in range(columns):
                    across = overlap(left, right, Fraction(width * c, columns), Fraction(width * (c + 1), columns))
                    total += vertical * across * Fraction(float(values[r, c]))
            result[i, j] = total / ((bottom - top) * (right - left))
    return result


@pytest.mark.parametrize("seed", range(8))
def test_cropped_maps_are_exact_area_integrals(seed: int) -> None:
    generator = np.random.default_rng(seed)
    rows, columns, side = generator.integers(2, 7), generator.integers(2, 8), int(generator.integers(1, 6))
    frame = int(generator.integers(40, 90)), int(generator.integers(40, 90))
    left, top = (int(generator.integers(0, 20)) for _ in range(2))
    box = Box(left, top, int(generator.integers(5, frame[0] - left)), int(generator.integers(5, frame[1] - top)))
    values = generator.normal(size=(rows, columns)).astype(np.float32)
    expected = integrate_exactly(values, frame, box, side)
    np.testing.assert_allclose(crop_map(values, frame, box, side, False), expected, atol=2e-6)
    np.testing.assert_allclose(crop_map(values, frame, box, side, True), expected[:, ::-1], atol=2e-6)


def test_a_crop_that_falls_on_the_cells_gives_the_cells_back() -> None:
    values = np.arange(4 * 5, dtype=np.float32).reshape(4, 5)
    np.testing.assert_array_equal(crop_map(values, (80, 64), Box(16, 0, 64, 64), 4, False), values[:, 1:])


@pytest.mark.parametrize("window", [2, 3, 4, 5])
@pytest.mark.parametrize("flip", [False, True])
def test_values_of_windows_are_interpolated_at_the_tokens_centres(window: int, flip: bool) -> None:
    """Windows whose value is linear in their centre give every token the value at its centre, or that of the outermost."""
    frame, cells, box, side = (90, 60), (12, 18), Box(11, 2, 70, 55), 7
    cell = 5.0  # pixels
    centres = [(np.arange(count - window + 1) + window / 2) * cell for count in cells]
    at = [3 * y - 2 * x for y, x in np.array(np.meshgrid(*centres, indexing="ij")).reshape(2, -1).T]
    windows = np.reshape(at, [len(axis) for axis in centres])
    # Every cell has the value of the window around it, moved inside the frame.
    first = (window - 1) // 2
    places = [np.clip(np.arange(count) - first, 0, count - window) for count in cells]
    values = windows[np.ix_(*places)].astype(np.float32)
    y, x = (
        np.clip(start + length * (np.arange(side) + 0.5) / side, axis[0], axis[-1])
        for start, length, axis in ((box.top, box.height, centres[0]), (box.left, box.width, centres[1]))
    )
    expected = 3 * y[:, None] - 2 * x
    got = crop_map(values, frame, box, side, flip, window)
    np.testing.assert_allclose(got, expected[:, ::-1] if flip else expected, atol=1e-3)


def test_every_token_is_a_weighted_mean() -> None:
    for start, length, total in [(0, 64, 64), (3, 50, 64), (13, 7, 64), (0, 1, 64), (63, 1, 64)]:
        weights = overlap_matrix(start, length, total, cells=9, tokens=14)
        assert (weights >= 0).all()
        np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-5)


def test_leading_dimensions_are_kept() -> None:
    values = np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype(np.float16)
    whole = crop_map(values, (80, 64), Box(5, 6, 50, 40), 3, True)
    assert whole.shape == (2, 3, 3, 3) and whole.dtype == np.float32
    np.testing.assert_allclose(whole[1, 2], crop_map(values[1, 2], (80, 64), Box(5, 6, 50, 40), 3, True), rtol=1e-5)


def test_mirroring_turns_the_horizontal_part_of_vectors_round() -> None:
    vectors = np.zeros((2, 2, 2), dtype=np.float32)
    vectors[0, 0] = (1.5, -2)  # the upper left cell moves right and up
    plain = crop_vectors(vectors, (32, 32), Box(0, 0, 32, 32), 2, False)
    mirrored = crop_vectors(vectors, (32, 32), Box(0, 0, 32, 32), 2, True)
    np.testing.assert_array_equal(plain, vectors)
    np.testing.assert_array_equal(mirrored[0, 1], (-1.5, -2))  # upper right now, and moves left and up
    assert np.abs(mirrored).sum() == 3.5


def test_a_slot_s_value_is_the_mean_of_its_frames() -> None:
    values = np.arange(4 * 2 * 2, dtype=np.float32).reshape(4, 2, 2)
    np.testing.assert_array_equal(pool_slots(values, 2), [[2, 3, 4, 5], [10, 11, 12, 13]])
    np.testing.assert_array_equal(pool_slots(values, 1), values.reshape(4, 4))


def test_motion_of_a_stride_is_the_mean_of_its_steps() -> None:
    steps = np.arange(10, dtype=np.float16)[:, None, None]
    assert motion_between(steps, np.array([2, 3, 4]), 1).flatten().tolist() == [2, 3, 4]
    assert motion_between(steps, np.array([0, 3, 6]), 3).flatten().tolist() == [0, 2, 5]
    assert motion_between(steps, np.array([7, 9, 9]), 2).flatten().tolist() == [6.5, 8.5, 8.5]
