"""STM's mask: blobs, pairs and draws against plain numbers and known distributions."""

import math
from itertools import combinations, permutations
from typing import Literal

import pytest
import torch
from torch import Tensor

from stm.masking import count_masked, get_strategy, to_boolean
from stm.masking.spatiotemporal import (
    Sampling,
    average_blobs,
    divergence,
    draw_blobs,
    jitter,
    merge_pairs,
    mixture_probability,
    perturb,
    rank_as_released,
    straight_through,
)

BOTH: tuple[Sampling, ...] = ("as_released", "log_probability")
# The value that chi-square of so many degrees of freedom exceeds once in 10,000.
LIMIT = {5: 25.74, 15: 44.26}


def draw(seed: int, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def peaky(seed: int, *shape: int) -> Tensor:
    """Attention as a teacher's: few tokens have most of it, and the class token has some itself."""
    weight = draw(seed, *shape) ** 12
    return 0.9 * weight / weight.sum(dim=-1, keepdim=True)


def height(distance: float) -> float:
    if abs(distance) <= 0.25:
        return 2.0
    return 1 + max(0.0, 1 - 1.5 * (abs(distance) - 0.25))


def blob_by_loops(x: float, y: float, side: int) -> list[float]:
    places = [-1 + 2 * i / (side - 1) for i in range(side)]
    return [height(row - y) * height(column - x) for row in places for column in places]


def around(x: float, y: float, spread: float) -> list[tuple[float, float]]:
    return [(x + spread * right, y + spread * down) for down in (-1, 0, 1) for right in (-1, 0, 1)]


def chi_square(counts: Tensor, chances: Tensor) -> float:
    expected = chances * counts.sum()
    return ((counts - expected) ** 2 / expected).sum().item()


@pytest.mark.parametrize("side", [2, 3, 14])
def test_a_blob_is_the_product_of_the_heights_along_x_and_y(side: int) -> None:
    points = draw(0, 4, 5, 2) * 2 - 1
    expected = [[blob_by_loops(x, y, side) for x, y in row] for row in points.tolist()]
    torch.testing.assert_close(draw_blobs(points, side), torch.tensor(expected, dtype=torch.float64))


def test_x_is_the_column_and_y_the_row() -> None:
    top_right = draw_blobs(torch.tensor([0.75, -0.75]), 8).unflatten(0, (8, 8))
    assert top_right[0, 7] == top_right.max() == 4
    assert top_right[7, 0] == top_right.min() == 1


def test_a_point_s_own_gradient_is_the_slope_of_its_blob() -> None:
    point = (draw(1, 6, 2) * 1.5 - 0.75).requires_grad_()
    assert torch.autograd.gradcheck(lambda p: draw_blobs(p, 5), point)


@pytest.mark.parametrize("spread", [0.0, 0.2])
def test_averaged_blobs_are_the_mean_of_nine(spread: float) -> None:
    points = draw(2, 3, 2) * 1.5 - 0.75
    for (x, y), found, spots in zip(
        points.tolist(), average_blobs(points, 6, spread), jitter(points, spread), strict=True
    ):
        nine = [blob_by_loops(*spot, 6) for spot in around(x, y, spread)]
        expected = [math.fsum(values) / 9 for values in zip(*nine, strict=True)]
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
        torch.testing.assert_close(spots, torch.tensor(around(x, y, spread), dtype=torch.float64))


@pytest.mark.parametrize("last", ["former", "latter"])
@pytest.mark.parametrize("frames", [2, 3, 5])
def test_frames_get_the_mean_of_their_pairs_and_the_outer_ones_what_one_pair_says(
    frames: int, last: Literal["former", "latter"]
) -> None:
    former, latter = draw(3, 2, frames - 1, 4), draw(4, 2, frames - 1, 4)
    merged = merge_pairs(former, latter, last)
    for t in range(frames):
        if t == 0:
            expected = former[:, 0]
        elif t == frames - 1:
            expected = (former if last == "former" else latter)[:, frames - 2]
        else:
            expected = (former[:, t] + latter[:, t - 1]) / 2
        assert torch.equal(merged[:, t], expected)


@pytest.mark.parametrize("sampling", BOTH)
def test_scores_equal_those_of_loops(sampling: Sampling) -> None:
    mixture, noise = peaky(5, 2, 3, 9), draw(6, 2, 3, 9)
    score = perturb(mixture_probability(mixture, sampling), noise, sampling)
    for row, draws, found in zip(mixture.view(-1, 9), noise.view(-1, 9), score.view(-1, 9), strict=True):
        parts = [math.exp(v) if sampling == "as_released" else v for v in row.tolist()]
        parts = [v / math.fsum(parts) for v in parts]
        base = parts if sampling == "as_released" else [math.log(v) for v in parts]
        expected = [v - math.log(-math.log(u)) for v, u in zip(base, draws.tolist(), strict=True)]
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("sampling", BOTH)
def test_no_noise_and_no_probability_makes_a_score_infinite(sampling: Sampling) -> None:
    mixture = torch.tensor([0.0, 0.0, 0.3, 1e-30])
    for noise in (torch.tensor([0.0, 0.5, 1 - 2**-24, 1.0]), torch.zeros(4), torch.ones(4)):
        for given in (mixture, torch.zeros(4)):
            assert perturb(mixture_probability(given, sampling), noise, sampling).isfinite().all()


def test_tokens_without_any_part_are_hidden_after_all_others() -> None:
    noise = draw(7, 1000, 1, 6).float()
    mixture = torch.tensor([0.0, 0.4, 0.0, 0.2, 0.0, 1e-6])
    score = perturb(mixture_probability(mixture, "log_probability"), noise, "log_probability")
    kept = get_strategy("spatiotemporal")({"spatiotemporal": score, "noise": noise}, 0.5)
    assert (kept == torch.tensor([0, 2, 4])).all()


@pytest.mark.parametrize("sampling", BOTH)
@pytest.mark.parametrize(("tokens", "ratio"), [(196, 0.7), (16, 0.9), (9, 0.5), (4, 0.2)])
def test_the_strategy_hides_the_highest_and_the_weight_is_the_same_mask(
    sampling: Sampling, tokens: int, ratio: float
) -> None:
    noise = draw(8, 3, 4, tokens).float()
    score = perturb(mixture_probability(peaky(9, 3, 4, tokens).float(), sampling), noise, sampling)
    kept = get_strategy("spatiotemporal")({"spatiotemporal": score, "noise": noise}, ratio)
    hidden = to_boolean(kept, 4, tokens)
    masked = int(tokens * ratio)
    assert (hidden.sum(dim=2) == masked).all() and masked == count_masked(tokens, ratio)
    for clip in range(3):
        expected = [
            t * tokens + n
            for t in range(4)
            for n in sorted(sorted(range(tokens), key=score[clip, t].tolist().__getitem__)[: tokens - masked])
        ]
        assert kept[clip].tolist() == expected
    assert torch.equal(straight_through(score, noise, ratio, 0.05), hidden.float())


def test_equal_scores_are_decided_by_the_noise_in_strategy_and_weight_alike() -> None:
    score = torch.randint(0, 3, (20, 2, 16), generator=torch.Generator().manual_seed(0)).float()
    noise = torch.randint(0, 3, (20, 2, 16), generator=torch.Generator().manual_seed(1)) / 3
    kept = get_strategy("spatiotemporal")({"spatiotemporal": score, "noise": noise}, 0.6)
    assert torch.equal(straight_through(score, noise, 0.6, 0.05).bool(), to_boolean(kept, 2, 16))


def test_the_weight_s_gradient_is_the_softmax_s() -> None:
    score, noise, upstream = draw(10, 2, 2, 8).requires_grad_(), draw(11, 2, 2, 8), draw(12, 2, 2, 8)
    (straight_through(score, noise, 0.5, 0.3) * upstream).sum().backward()
    for found, row, up in zip(*(v.view(-1, 8) for v in (score.grad, score.detach(), upstream)), strict=True):
        shares = [math.exp(v / 0.3) for v in row.tolist()]
        shares = [v / math.fsum(shares) for v in shares]
        mean = math.fsum(y * u for y, u in zip(shares, up.tolist(), strict=True))
        expected = [y * (u - mean) / 0.3 for y, u in zip(shares, up.tolist(), strict=True)]
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_the_temperature_changes_no_mask() -> None:
    score, noise = draw(13, 4, 2, 49), draw(14, 4, 2, 49)
    assert torch.equal(straight_through(score, noise, 0.7, 0.05), straight_through(score, noise, 0.7, 5.0))


DRAWS = 40_000


def draw_masks(mixture: Tensor, sampling: Sampling, ratio: float, draws: int) -> Tensor:
    """Masks of one frame of that mixture [N], bool [draws, N]."""
    noise = torch.rand(draws, 1, len(mixture), generator=torch.Generator().manual_seed(15))
    score = perturb(mixture_probability(mixture, sampling), noise, sampling)
    kept = get_strategy("spatiotemporal")({"spatiotemporal": score, "noise": noise}, ratio)
    return to_boolean(kept, 1, len(mixture))[:, 0]


def test_log_probability_hides_the_first_token_in_proportion_to_the_mixture() -> None:
    mixture = peaky(16, 16).float() + 0.02
    first = draw_masks(mixture, "log_probability", 1 / 16, DRAWS)
    assert (first.sum(dim=1) == 1).all()
    assert chi_square(first.sum(dim=0), mixture / mixture.sum()) < LIMIT[15]


def test_as_released_hides_the_first_token_in_proportion_to_the_softmax_of_the_parts() -> None:
    mixture = torch.tensor([0.0, 1.0, 3.0, 6.0])  # as large as the formula needs to differ from uniform
    first = draw_masks(mixture, "as_released", 0.25, DRAWS)
    assert chi_square(first.sum(dim=0), mixture.softmax(0).softmax(0)) < LIMIT[5]


def test_log_probability_draws_without_replacement() -> None:
    weights = [0.1, 0.2, 0.3, 0.4]
    hidden = draw_masks(torch.tensor(weights), "log_probability", 0.5, DRAWS)
    pairs = list(combinations(range(4), 2))
    counts = torch.stack([hidden[:, list(pair)].all(dim=1).sum() for pair in pairs])
    chances = [sum(weights[i] * weights[j] / (1 - weights[i]) for i, j in permutations(pair)) for pair in pairs]
    assert chi_square(counts, torch.tensor(chances)) < LIMIT[5]


def test_the_noise_of_as_released_hides_every_token_about_equally_often_and_log_probability_does_not() -> None:
    """At ratio 0.7, with points at the centre; before the released ranking, which the next test is about."""
    temporal = average_blobs(torch.zeros(2), 14, 0.2).softmax(0)
    mixture = 0.5 * temporal + 0.5 * peaky(17, 196).float()
    released = draw_masks(mixture, "as_released", 0.7, 20_000).float().mean(dim=0)
    assert released.min() > 0.684 and released.max() < 0.716
    assert divergence(mixture_probability(mixture, "as_released"), "as_released") < 1e-4
    drawn = draw_masks(mixture, "log_probability", 0.7, 5_000).float().mean(dim=0)
    assert drawn.min() < 0.5 and drawn.max() > 0.95
    assert divergence(mixture_probability(mixture, "log_probability"), "log_probability") > 0.1


def rank_by_loops(row: list[float], temperature: float) -> list[int]:
    """Tokens by a softmax in float32, whose smallest positive number is 2**-149; equal ones by index."""
    shares = [math.exp((v - max(row)) / temperature) for v in row]
    shares = [share if share > 2**-150 else 0.0 for share in shares]
    return sorted(range(len(row)), key=lambda n: (-shares[n], n))


def test_as_released_hides_tokens_that_underflow_in_the_order_of_their_index() -> None:
    score = perturb(draw(19, 30, 1, 196).float().softmax(dim=-1), draw(20, 30, 1, 196).float(), "as_released")
    ranked = rank_as_released(score, 0.05)
    kept = get_strategy("spatiotemporal")({"spatiotemporal": ranked, "noise": torch.rand(30, 1, 196)}, 0.7)
    by_loops = [rank_by_loops(row, 0.05) for row in score[:, 0].double().tolist()]
    assert kept.tolist() == [sorted(order[137:]) for order in by_loops]
    assert torch.equal(rank_as_released(score, 5.0), score)  # nothing underflows
    assert ranked.isfinite().all() and not torch.equal(ranked, score)


def test_as_released_hides_the_top_of_a_frame_more_often_than_its_bottom() -> None:
    noise = torch.rand(4_000, 1, 196, generator=torch.Generator().manual_seed(21))
    ranked = rank_as_released(perturb(torch.full((196,), 1 / 196), noise, "as_released"), 0.05)
    kept = get_strategy("spatiotemporal")({"spatiotemporal": ranked, "noise": noise}, 0.7)
    rows = to_boolean(kept, 1, 196).float().mean(dim=0).view(14, 14).mean(dim=1)
    assert (rows[:3] > 0.88).all() and (rows[-3:] < 0.46).all()  # 0.70 in every row without underflow


@pytest.mark.parametrize("sampling", BOTH)
def test_the_divergence_is_that_of_the_first_hidden_token_from_uniform(sampling: Sampling) -> None:
    probability = mixture_probability(peaky(18, 2, 3, 10), sampling)
    frames = probability.softmax(dim=-1) if sampling == "as_released" else probability
    total = math.fsum(p * math.log(p * 10) for frame in frames.view(-1, 10).tolist() for p in frame if p > 0)
    torch.testing.assert_close(divergence(probability, sampling).item(), total / 6)


def test_the_divergence_goes_from_zero_to_the_logarithm_of_the_tokens() -> None:
    even, certain = torch.full((1, 8), 1 / 8), torch.tensor([[0.0, 1.0, *[0.0] * 6]])
    assert divergence(even, "log_probability").item() == pytest.approx(0, abs=1e-6)
    assert divergence(even, "as_released").item() == pytest.approx(0, abs=1e-6)
    assert divergence(certain, "log_probability").item() == pytest.approx(math.log(8))
