"""Flow and compensated motion: followed, cropped and mirrored like the pixels."""

import numpy as np
import pytest

from stm.data.crop_boxes import Box
from stm.data.guides.crop import crop_map
from stm.data.guides.flow import crop_flow, flow_between, follow
from stm.data.guides.motion import compensate, motion_between

FRAME, ROWS, COLUMNS, CELLS = (80, 64), 4, 5, 2  # map cells of 16 pixels, flow cells of 8


def follow_by_hand(flow: np.ndarray, start: int, steps: int, direction: int, cells: int) -> np.ndarray:
    """Each cell's point alone, through bilinear weights written out; displacements in map cells."""
    _, rows, columns, _ = flow.shape
    moved = np.zeros((rows, columns, 2))
    for i in range(rows):
        for j in range(columns):
            x, y = float(j), float(i)  # in flow cells, centres at whole numbers
            for step in range(steps):
                field = flow[start + direction * step].astype(float)
                here_x, here_y = min(max(x, 0.0), columns - 1.0), min(max(y, 0.0), rows - 1.0)
                value = np.zeros(2)
                for r in range(rows):
                    for c in range(columns):
                        value += field[r, c] * max(0.0, 1 - abs(here_x - c)) * max(0.0, 1 - abs(here_y - r))
                x, y = x + value[0] * cells, y + value[1] * cells
            moved[i, j] = (x - j) / cells, (y - i) / cells
    return moved


@pytest.mark.parametrize("direction", [1, -1])
def test_a_point_is_followed_step_by_step(direction: int) -> None:
    flow = np.random.default_rng(0).normal(0, 0.7, (7, 4, 5, 2)).astype(np.float32)
    starts, steps = np.array([3, 3, 3, 3]), np.array([0, 1, 2, 3])
    moved = follow(flow, starts, steps, direction, 2)
    for number, count in enumerate(steps.tolist()):
        expected = follow_by_hand(flow, 3, count, direction, 2)
        np.testing.assert_allclose(moved[number], expected, atol=1e-5)


def test_constant_flow_adds_up() -> None:
    packed = np.broadcast_to(np.array([0.5, -0.25], dtype=np.float16), (2, 12, 6, 8, 2)).copy()
    packed[1] *= -1
    flow = flow_between(packed, 2, np.array([2, 5, 8, 12]), 2)
    assert flow.shape == (2, 4, 6, 8, 2) and flow.dtype == np.float32
    for number, steps in enumerate([3, 3, 4]):
        np.testing.assert_allclose(flow[0, number], np.broadcast_to([0.5 * steps, -0.25 * steps], (6, 8, 2)))
        np.testing.assert_allclose(flow[1, number + 1], np.broadcast_to([-0.5 * steps, 0.25 * steps], (6, 8, 2)))
    assert not flow[0, -1].any() and not flow[1, 0].any()


def test_rotating_flow_is_followed_round() -> None:
    """n small rotations are one of n times the angle; a rotation's flow is linear in place, so nothing is lost between."""
    rows = columns = 21
    y, x = np.meshgrid(np.arange(rows) - 10.0, np.arange(columns) - 10.0, indexing="ij")

    def rotation(angle: float) -> np.ndarray:
        turned = np.stack([np.cos(angle) * x - np.sin(angle) * y, np.sin(angle) * x + np.cos(angle) * y], axis=-1)
        return (turned - np.stack([x, y], axis=-1)) / 2  # in map cells of 2 flow cells

    packed = np.stack([np.repeat(rotation(angle)[None], 9, axis=0) for angle in (0.1, -0.1)]).astype(np.float32)
    flow = flow_between(packed, 0, np.array([0, 5, 8]), 2)
    inside = np.hypot(x, y) <= 9.5  # points that stay between the outermost centres
    for got, angle in ((flow[0, 0], 0.5), (flow[0, 1], 0.3), (flow[1, 1], -0.5), (flow[1, 2], -0.3)):
        np.testing.assert_allclose(got[inside], rotation(angle)[inside], atol=1e-4)


def test_frames_taken_twice_do_not_move() -> None:
    packed = np.ones((2, 4, 2, 3, 2), dtype=np.float16)
    flow = flow_between(packed, 0, np.array([0, 2, 3, 3, 3]), 1)
    assert flow[0, :, 0, 0, 0].tolist() == [2, 1, 0, 0, 0]
    assert flow[1, :, 0, 0, 0].tolist() == [0, 2, 1, 0, 0]


def test_a_stride_of_one_gives_the_packed_flow_itself() -> None:
    packed = np.random.default_rng(1).normal(0, 3, (2, 6, 4, 4, 2)).astype(np.float16)
    flow = flow_between(packed[:, 1:5], 1, np.arange(1, 5), 2)
    np.testing.assert_array_equal(flow[0, :-1], packed[0, 1:4])
    np.testing.assert_array_equal(flow[1, 1:], packed[1, 2:5])


def on_pixels(values: np.ndarray) -> np.ndarray:
    """A map on the full frame, as one value a pixel."""
    return values.repeat(FRAME[1] // values.shape[0], axis=0).repeat(FRAME[0] // values.shape[1], axis=1)


def mean_of_blocks(pixels: np.ndarray, side: int) -> np.ndarray:
    height, width = pixels.shape[0] // side, pixels.shape[1] // side
    return pixels.reshape(side, height, side, width, *pixels.shape[2:]).mean(axis=(1, 3))


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("box", [Box(0, 0, 64, 64), Box(13, 5, 56, 40), Box(16, 0, 64, 48), Box(37, 21, 24, 32)])
def test_cropped_flow_is_that_of_the_cropped_pixels(box: Box, flip: bool) -> None:
    """In pixels: cut the field out, mirror it, and measure it in the crop's tokens."""
    side = 4
    flow = np.random.default_rng(2).normal(size=(ROWS * CELLS, COLUMNS * CELLS, 2)).astype(np.float32)
    pixels = on_pixels(flow) * [FRAME[0] / COLUMNS, FRAME[1] / ROWS]  # displacements in pixels
    pixels = pixels[box.top : box.top + box.height, box.left : box.left + box.width]
    if flip:
        pixels = pixels[:, ::-1] * [-1, 1]
    expected = mean_of_blocks(pixels / [box.width / side, box.height / side], side * CELLS)
    got = crop_flow(np.stack([flow, 2 * flow]), FRAME, box, side, CELLS, flip)
    assert got.shape == (2, 8, 8, 2) and got.dtype == np.float32
    np.testing.assert_allclose(got, np.stack([expected, 2 * expected]), atol=1e-5)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("box", [Box(0, 0, 64, 64), Box(13, 5, 56, 40), Box(37, 21, 24, 32)])
def test_compensated_motion_follows_crop_and_flip(box: Box, flip: bool) -> None:
    motion = np.random.default_rng(3).normal(size=(3, ROWS, COLUMNS, 3)).astype(np.float16)
    camera = [np.median(motion[1, ..., axis].astype(float)) for axis in (1, 2)]
    length = np.sqrt(((motion[1, ..., 1:].astype(float) - camera) ** 2).sum(axis=-1))
    pixels = on_pixels(length)[box.top : box.top + box.height, box.left : box.left + box.width]
    expected = mean_of_blocks(pixels[:, ::-1] if flip else pixels, 4)
    got = crop_map(compensate(motion), FRAME, box, 4, flip)
    np.testing.assert_allclose(got[1], expected, atol=1e-3)


def test_the_camera_s_motion_is_taken_away() -> None:
    motion = np.zeros((2, ROWS, COLUMNS, 3), dtype=np.float32)
    motion[..., 1:] = (3, -2)  # the camera pans
    motion[1, 2, 3, 1:] += (0.6, 0.8)  # and one cell moves by itself
    expected = np.zeros((2, ROWS, COLUMNS))
    expected[1, 2, 3] = 1
    np.testing.assert_allclose(compensate(motion), expected, atol=1e-6)
    np.testing.assert_allclose(motion_between(compensate(motion), np.array([1]), 2)[0], expected[1] / 2, atol=1e-6)
