"""MGMAE's masks where the answer is known in closed form."""

import math

import pytest
import torch
from masking_loops import draw_guides, flow_scores
from torch import Tensor

from stm.masking import get_strategy, to_boolean
from stm.masking.flow import spread


def visible(noise: Tensor, flow: Tensor, ratio: float) -> Tensor:
    """bool [B, slots, side, side], True where visible."""
    kept = get_strategy("flow")({"noise": noise, "flow": flow}, ratio)
    side = math.isqrt(noise.shape[2])
    return ~to_boolean(kept, *noise.shape[1:]).unflatten(2, (side, side))


def constant_flow(frames: int, cells: int, x: float, y: float) -> Tensor:
    """Everything moves by (x, y) tokens from each frame to the next: [1, 2, T, cells, cells, 2]."""
    forward = torch.tensor([x, y]).expand(1, 1, frames, cells, cells, 2)
    return torch.cat([forward, -forward], dim=1)


def test_without_flow_every_slot_shows_the_tokens_that_random_shows_in_the_middle() -> None:
    noise = draw_guides(0, slots=8, tokens=196, batch=4)["noise"]
    mask = visible(noise, torch.zeros(4, 2, 16, 28, 28, 2), 0.9)
    middle = ~to_boolean(get_strategy("random")({"noise": noise}, 0.9), 8, 196)[:, 4].view(4, 14, 14)
    assert torch.equal(mask, middle[:, None].expand_as(mask))


@pytest.mark.parametrize("cells", [8, 16])
@pytest.mark.parametrize(("x", "y"), [(1, 0), (-1, 0), (0, 1), (1, -1)])
@pytest.mark.parametrize("frames", [5, 4])
def test_a_constant_flow_moves_the_visible_tokens_by_whole_tokens(frames: int, x: int, y: int, cells: int) -> None:
    """One frame a slot; the seeds are in the middle, so that none leaves and no hole is near."""
    noise = torch.rand(1, frames, 64, generator=torch.Generator().manual_seed(1)) * 0.5 + 0.5
    seeds = [27, 28, 36]  # rows and columns 3 and 4
    noise[:, :, seeds] *= 0.1
    mask = visible(noise, constant_flow(frames, cells, x, y), 1 - 3.5 / 64 + 0.01)
    for frame in range(frames):
        step = frame - frames // 2
        expected = {(seed // 8 + y * step, seed % 8 + x * step) for seed in seeds}
        assert {(r, c) for r, c in mask[0, frame].nonzero().tolist()} == expected


def test_half_a_token_a_frame_has_moved_one_token_after_two_frames() -> None:
    noise = torch.ones(1, 5, 64) * 0.9
    noise[:, :, 27] = 0.1
    mask = visible(noise, constant_flow(5, 16, 0.5, 0), 63.5 / 64)
    assert mask[0, 0].flatten().nonzero().tolist() == [[26]]
    assert mask[0, 4].flatten().nonzero().tolist() == [[28]]


def test_where_nothing_arrives_the_middle_frame_s_map_stands_in() -> None:
    """Everything moves right by two tokens: the two columns on the left are holes, and keep what the base frame has."""
    noise = torch.rand(1, 3, 16, generator=torch.Generator().manual_seed(2)) * 0.5 + 0.5
    noise[:, 1, [0, 6]] = 0.1  # a seed that both moves and stays, and one that leaves
    noise[:, 2] = torch.linspace(0.9, 0.5, 16)
    mask = visible(noise, constant_flow(3, 8, 2, 0), 14 / 16)
    assert mask[0, 2].flatten().nonzero().flatten().tolist() == [0, 2]


def test_tokens_of_exactly_equal_score_are_kept_by_the_lower_noise() -> None:
    """One seed, copied by a hole: it stays at the edge and moves inward, with one place to give."""
    for lower, expected in ((0, 0), (1, 1)):
        noise = torch.full((1, 3, 16), 0.9)
        noise[:, 1, 0] = 0.0
        noise[:, 2, lower] = 0.5
        mask = visible(noise, constant_flow(3, 8, 1, 0), 15 / 16)
        assert mask[0, 2].flatten().nonzero().flatten().tolist() == [expected]


def test_both_sides_of_the_middle_frame_are_warped_with_the_flow_to_the_known_neighbour() -> None:
    """A clip and its reverse have the same maps, in reverse: forward and backward flow change roles."""
    guides = draw_guides(3, slots=5, tokens=16, dtype=torch.float64)
    flow = guides["flow"][:, :, :5]  # one frame a slot, as many on each side
    reverse = flow.flip(1).flip(2)
    mask = visible(guides["noise"], flow, 0.75)
    noise = guides["noise"].flip(1)
    assert torch.equal(visible(noise, reverse, 0.75), mask.flip(1))


def test_tracks_end_where_the_object_is_and_not_where_it_would_be_by_the_wrong_flow() -> None:
    """An object of 4 x 4 tokens moves a token a frame over a resting ground; its seeds stay on it."""
    frames, side, cells = 9, 12, 24
    flow, places = torch.zeros(1, 2, frames, cells, cells, 2), []
    for frame in range(frames):
        left = 4 + frame - 4
        flow[0, 0, frame, 8:16, 2 * left : 2 * left + 8, 0] = 1
        flow[0, 1, frame, 8:16, 2 * left : 2 * left + 8, 0] = -1
        places.append(left)
    noise = torch.rand(1, frames, 144, generator=torch.Generator().manual_seed(4)) * 0.5 + 0.5
    noise[:, 4, 5 * side + 5] = 0.0  # in the middle frame the object is in columns 4 to 7
    mask = visible(noise, flow, 143 / 144)
    found = [divmod(mask[0, frame].flatten().nonzero().item(), side) for frame in range(frames)]
    assert found == [(5, places[frame] + 1) for frame in range(frames)]


@pytest.mark.parametrize("cells", [1, 2, 3, 8, 16])
def test_scores_equal_those_of_loops_for_flows_of_any_resolution(cells: int) -> None:
    generator = torch.Generator().manual_seed(cells)
    noise = torch.rand(4, 4, 9, generator=generator, dtype=torch.float64)
    flow = torch.randn(4, 2, 8, 3 * cells, 3 * cells, 2, generator=generator, dtype=torch.float64)
    shown = visible(noise, flow, 0.7).flatten(2)
    score = torch.from_numpy(flow_scores(noise, flow, 0.7, max(8, cells)))
    least, most = score.masked_fill(~shown, math.inf).amin(dim=2), score.masked_fill(shown, -math.inf).amax(dim=2)
    assert (least >= most - 1e-9).all()


def test_a_map_that_rests_is_carried_without_any_rounding() -> None:
    middle = torch.rand(2, 56, 56, generator=torch.Generator().manual_seed(5))
    maps = spread(middle, torch.zeros(2, 2, 16, 14, 14, 2), 8)
    assert torch.equal(maps, middle[:, None].expand_as(maps))


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf, 1e30])
def test_flow_that_is_no_number_makes_holes_not_errors(broken: float) -> None:
    guides = draw_guides(6, slots=4, tokens=16)
    clean = get_strategy("flow")(guides, 0.75)
    guides["flow"][0] = broken
    kept = get_strategy("flow")(guides, 0.75)
    assert torch.equal(kept[1:], clean[1:])
    middle = ~to_boolean(get_strategy("random")(guides, 0.75), 4, 16)[0, 2]
    assert torch.equal(~to_boolean(kept, 4, 16)[0], middle.expand(4, 16))  # all holes: nothing moves


@pytest.mark.parametrize("frames", [2, 3, 4, 7, 16])
def test_any_number_of_frames_has_a_map_for_each(frames: int) -> None:
    flow = torch.zeros(1, 2, frames, 4, 4, 2)
    assert spread(torch.rand(1, 16, 16), flow, 8).shape == (1, frames, 16, 16)
