"""The strategies that draw, random, tube and attention, against the exact distributions."""

import math
from itertools import combinations, permutations

import pytest
import torch
from masking_loops import draw_guides
from torch import Tensor

from stm.masking import get_strategy, to_boolean

DRAWS = 40_000
# The value that chi-square of so many degrees of freedom exceeds once in 10,000.
LIMIT = {5: 25.74, 9: 33.72, 35: 74.93}


def count_subsets(kept: Tensor, tokens: int, count: int) -> Tensor:
    """How often each subset of `count` tokens was kept, in the order of `combinations`: [subsets]."""
    subsets = list(combinations(range(tokens), count))
    codes = torch.tensor([sum(1 << token for token in subset) for subset in subsets])
    return ((1 << kept).sum(dim=1)[:, None] == codes).sum(dim=0)


def draw_in_turn(weights: list[float], count: int) -> Tensor:
    """The probability of each subset when tokens are drawn one after the other in proportion to their weights."""
    chances = []
    for subset in combinations(range(len(weights)), count):
        chance = 0.0
        for order in permutations(subset):
            rest, product = sum(weights), 1.0
            for token in order:
                product *= weights[token] / rest
                rest -= weights[token]
            chance += product
        chances.append(chance)
    return torch.tensor(chances)


def chi_square(counts: Tensor, chances: Tensor) -> float:
    expected = chances * counts.sum()
    return ((counts - expected) ** 2 / expected).sum().item()


@pytest.mark.parametrize("weights", [[1, 1, 1, 1], [1, 2, 3, 4], [0.001, 0.1, 0.2, 0.001]])
def test_attention_draws_visible_tokens_in_proportion_and_without_replacement(weights: list[float]) -> None:
    noise = torch.rand(DRAWS, 1, 4, generator=torch.Generator().manual_seed(0))
    attention = torch.tensor(weights).expand(DRAWS, 1, 4)
    kept = get_strategy("attention")({"noise": noise, "attention": attention}, 0.5)
    assert chi_square(count_subsets(kept, 4, 2), draw_in_turn(weights, 2)) < LIMIT[5]


def test_attention_has_the_distribution_of_torch_s_multinomial() -> None:
    weights = [0.02, 0.3, 0.1, 0.25, 0.08]
    generator = torch.Generator().manual_seed(1)
    drawn = torch.multinomial(torch.tensor(weights).expand(DRAWS, 5), 5, generator=generator)[:, :3].sort(dim=1).values
    assert chi_square(count_subsets(drawn, 5, 3), draw_in_turn(weights, 3)) < LIMIT[9]  # UMT's way
    noise = torch.rand(DRAWS, 1, 5, generator=generator)
    kept = get_strategy("attention")({"noise": noise, "attention": torch.tensor(weights).expand(DRAWS, 1, 5)}, 0.4)
    assert chi_square(count_subsets(kept, 5, 3), draw_in_turn(weights, 3)) < LIMIT[9]  # ours


def test_the_scale_of_the_attention_does_not_matter_however_small() -> None:
    guides = draw_guides(0, slots=4, tokens=49)
    small = {**guides, "attention": guides["attention"] * 2.0**-100}
    assert torch.equal(get_strategy("attention")(small, 0.8), get_strategy("attention")(guides, 0.8))


@pytest.mark.parametrize("nothing", [0.0, -1.0, math.nan])
def test_tokens_without_attention_are_hidden_first_and_by_chance_among_themselves(nothing: float) -> None:
    noise = torch.rand(DRAWS, 1, 6, generator=torch.Generator().manual_seed(2))
    attention = torch.tensor([nothing, 0.5, nothing, nothing, nothing, 0.01]).expand(DRAWS, 1, 6)
    kept = get_strategy("attention")({"noise": noise, "attention": attention}, 0.34)  # 4 of 6 stay
    hidden = to_boolean(kept, 1, 6)
    assert not hidden[..., [1, 5]].any()
    counts = count_subsets(kept, 6, 4)
    assert chi_square(counts[counts > 0], torch.full((6,), 1 / 6)) < LIMIT[5]


def test_a_token_of_no_attention_stays_hidden_even_if_its_noise_is_zero() -> None:
    noise = torch.tensor([[[0.0, 0.9, 0.8, 0.7]]])
    attention = torch.tensor([[[0.0, 1e-38, 1.0, 0.0]]])
    assert get_strategy("attention")({"noise": noise, "attention": attention}, 0.5).tolist() == [[1, 2]]


def test_without_any_attention_the_mask_is_random() -> None:
    guides = draw_guides(3, slots=4, tokens=16)
    guides["attention"] = torch.zeros_like(guides["attention"])
    assert torch.equal(get_strategy("attention")(guides, 0.75), get_strategy("random")(guides, 0.75))


def test_infinite_attention_is_always_seen() -> None:
    guides = draw_guides(4, slots=4, tokens=16, batch=200)
    guides["attention"][:, :, 3] = math.inf
    assert not to_boolean(get_strategy("attention")(guides, 0.9), 4, 16)[:, :, 3].any()


def test_random_keeps_every_subset_equally_often() -> None:
    noise = torch.rand(DRAWS, 1, 5, generator=torch.Generator().manual_seed(5))
    kept = get_strategy("random")({"noise": noise}, 0.6)
    assert chi_square(count_subsets(kept, 5, 2), torch.full((10,), 0.1)) < LIMIT[9]


def test_random_masks_of_different_slots_are_independent() -> None:
    noise = torch.rand(DRAWS, 2, 4, generator=torch.Generator().manual_seed(6))
    kept = get_strategy("random")({"noise": noise}, 0.5)
    first, second = kept[:, :2], kept[:, 2:] - 4
    pairs = [count_subsets(second[((1 << first).sum(dim=1)) == code], 4, 2) for code in (3, 5, 9, 6, 10, 12)]
    assert chi_square(torch.cat(pairs), torch.full((36,), 1 / 36)) < LIMIT[35]


def test_tube_keeps_every_subset_equally_often() -> None:
    noise = torch.rand(DRAWS, 2, 4, generator=torch.Generator().manual_seed(7))
    kept = get_strategy("tube")({"noise": noise}, 0.5)[:, :2]
    assert chi_square(count_subsets(kept, 4, 2), torch.full((6,), 1 / 6)) < LIMIT[5]
