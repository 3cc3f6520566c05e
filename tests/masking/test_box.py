"""MGM as a moving box: its size, its place, what it does beside the box."""

import math

import pytest
import torch

from stm.masking import get_strategy, to_boolean
from stm.masking.box import box_shape


@pytest.mark.parametrize(
    ("masked", "shape"),
    [(176, (13, 13)), (156, (12, 13)), (147, (12, 12)), (137, (11, 12)), (117, (9, 13)), (98, (8, 12)), (1, (1, 1))],
)
def test_the_box_of_common_ratios_on_14_by_14(masked: int, shape: tuple[int, int]) -> None:
    assert box_shape(masked, 14) == shape


def test_of_two_boxes_as_large_the_squarer_is_taken() -> None:
    assert box_shape(840, 40) == (28, 30)  # and not 24 x 35


def test_no_box_of_the_allowed_proportions_is_larger() -> None:
    for side in range(1, 20):
        for masked in range(side * side):
            height, width = box_shape(masked, side)
            areas = [
                h * w
                for h in range(1, side + 1)
                for w in range(h, side + 1)
                if h * w <= masked and w / h <= 1.5  # exact: both are small whole numbers
            ]
            assert height * width == max(areas, default=0)
            assert height <= width <= min(side, 1.5 * height)


def test_the_box_follows_a_moving_object() -> None:
    slots, side = 8, 14
    motion = torch.zeros(1, slots, side, side)
    for slot in range(slots):
        motion[0, slot, 4:8, slot : slot + 6] = 1.0  # 4 x 6 tokens, to the right
    guides = {
        "noise": torch.rand(1, slots, 196, generator=torch.Generator().manual_seed(0)),
        "motion": motion.flatten(2),
    }
    hidden = to_boolean(get_strategy("motion_box")(guides, 24.5 / 196), slots, 196).unflatten(2, (side, side))
    assert box_shape(24, side) == (4, 6)
    assert torch.equal(hidden[0], motion[0] > 0)


def test_the_box_takes_the_larger_of_two_objects_and_the_rest_goes_to_the_other() -> None:
    motion = torch.zeros(1, 1, 8, 8)
    motion[0, 0, 1:4, 1:4] = 2.0
    motion[0, 0, 5:8, 4:8] = 1.0
    guides = {"noise": torch.rand(1, 1, 64), "motion": motion.flatten(2)}
    hidden = to_boolean(get_strategy("motion_box")(guides, 11.5 / 64), 1, 64).view(8, 8)
    assert box_shape(11, 8) == (3, 3)
    assert hidden[1:4, 1:4].all()
    assert hidden[5:8, 4:8].sum() == 2


def test_on_still_frames_every_place_is_equally_likely() -> None:
    draws, side = 18_000, 4
    noise = torch.rand(draws, 1, 16, generator=torch.Generator().manual_seed(1))
    hidden = to_boolean(
        get_strategy("motion_box")({"noise": noise, "motion": torch.ones(draws, 1, 16)}, 4.2 / 16), 1, 16
    ).view(draws, side, side)
    places = [hidden[:, top : top + 2, left : left + 2].all(dim=(1, 2)).sum() for top in range(3) for left in range(3)]
    assert sum(places) == draws
    statistic = sum((count.item() - draws / 9) ** 2 / (draws / 9) for count in places)
    assert statistic < 31.83  # exceeded once in 10,000, for 8 degrees of freedom


def test_a_box_with_an_infinite_or_unknown_motion_is_taken() -> None:
    for broken in (math.inf, math.nan):
        motion = torch.rand(1, 1, 36)
        motion[0, 0, 35] = broken
        hidden = to_boolean(get_strategy("motion_box")({"noise": torch.rand(1, 1, 36), "motion": motion}, 0.25), 1, 36)
        assert hidden.view(6, 6)[3:, 3:].all()


def test_the_compensated_box_is_the_box_of_the_compensated_motion() -> None:
    generator = torch.Generator().manual_seed(2)
    noise, motion = (torch.rand(2, 3, 49, generator=generator) for _ in range(2))
    one = get_strategy("motion_box")({"noise": noise, "motion": motion}, 0.75)
    other = get_strategy("motion_compensated_box")({"noise": noise, "motion_compensated": motion}, 0.75)
    assert torch.equal(one, other)


def test_a_slot_that_is_no_square_is_an_error_for_people() -> None:
    guides = {"noise": torch.rand(1, 1, 12), "motion": torch.rand(1, 1, 12)}
    with pytest.raises(ValueError, match="12 tokens is not a square"):
        get_strategy("motion_box")(guides, 0.5)
