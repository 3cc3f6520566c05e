"""Hard negatives and matching against loops over plain numbers, in float64."""

import math

import numpy as np
import pytest
import torch
from drawn import draw_pairs, rand
from torch import Tensor

from stm.objectives.matching import matching_loss, sample_negatives


def weigh(similarity: Tensor, ids: Tensor, temperature: float) -> np.ndarray:
    """Probability of each column, by loops."""
    rows, found = len(ids), np.zeros((len(ids), len(ids)))
    for i in range(rows):
        total = sum(math.exp(similarity[i, j].item() / temperature) for j in range(rows))
        for j in range(rows):
            if ids[i] != ids[j]:
                found[i, j] = math.exp(similarity[i, j].item() / temperature) / total
    return found / found.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("ids", [[0, 1, 2, 3, 4, 5], [0, 1, 0, 3, 1, 0]])
def test_negatives_are_never_positives_and_as_frequent_as_the_softmax_says(ids: list[int]) -> None:
    video, text = draw_pairs(6)
    similarity, numbers, draws = video @ text.T, torch.tensor(ids), 4000
    noise = rand(draws, 6, 6)
    found = torch.stack([sample_negatives(similarity, numbers, 0.3, one) for one in noise])  # [draws, 6]
    assert (numbers[found] != numbers).all()
    expected = weigh(similarity, numbers, 0.3)
    counts = torch.nn.functional.one_hot(found, 6).double().mean(dim=0).numpy()
    error = np.sqrt(expected * (1 - expected) / draws)
    assert (np.abs(counts - expected) <= 4 * error + 1e-9).all()


def test_the_draw_is_that_of_exponential_times() -> None:
    """The first of independent exponential times is each with a probability in proportion to its rate: the noise says
    which, so that the draw can be told beforehand."""
    video, text = draw_pairs(5)
    similarity, ids, noise = video @ text.T, torch.tensor([0, 1, 2, 1, 4]), rand(5, 5, seed=1)
    weights = weigh(similarity, ids, 0.1)
    times = [[-math.log(1 - noise[i, j].item()) / max(weights[i, j], 1e-300) for j in range(5)] for i in range(5)]
    expected = np.argmin(times, axis=1).tolist()
    assert sample_negatives(similarity, ids, 0.1, noise).tolist() == expected
    assert sample_negatives(similarity / 0.1, ids, noise=noise).tolist() == expected


def test_without_noise_torchs_generator_draws() -> None:
    similarity, ids = torch.zeros(40, 40), torch.arange(40)
    torch.manual_seed(0)
    first, second = sample_negatives(similarity, ids), sample_negatives(similarity, ids)
    torch.manual_seed(0)
    assert torch.equal(sample_negatives(similarity, ids), first) and not torch.equal(first, second)


def test_a_row_whose_negatives_all_round_to_nothing_is_drawn_as_any_other() -> None:
    """At temperature 0.001 the softmax of all negatives is 0 in float32, and UMT's draw fails."""
    similarity = torch.eye(5) * 2 - 1
    similarity[0, 1:] += torch.tensor([1e-3, 0, 0, 0])  # one negative e times as likely as each of the others
    found = torch.stack([sample_negatives(similarity, torch.arange(5), 0.001, n) for n in rand(4000, 5, 5).float()])
    counts = torch.nn.functional.one_hot(found, 5).float().mean(dim=0)
    assert (counts.diagonal() == 0).all()
    expected = torch.full((5, 5), 0.25)
    expected[0, 1:] = torch.tensor([math.e, 1, 1, 1]) / (math.e + 3)
    assert ((counts - expected).abs()[~torch.eye(5, dtype=torch.bool)] < 0.04).all()


def test_no_floor_evens_out_negatives_beside_a_certain_positive() -> None:
    """One of 63 negatives is e**2 times as likely as each of the others, and together they have 1e-5 of the softmax."""
    similarity = torch.full((64, 64), -20.0).fill_diagonal_(0.0)
    similarity[:, 0] += 2.0
    drawn = torch.cat([sample_negatives(similarity, torch.arange(64), 1.0, n)[1:] for n in rand(200, 64, 64)])
    assert (drawn == 0).double().mean().item() == pytest.approx(math.e**2 / (math.e**2 + 62), abs=0.01)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_none_do_not_spoil_the_draw(bad: float) -> None:
    similarity = torch.zeros(4, 4)
    similarity[0] = bad
    similarity[1, 2] = bad
    ids = torch.tensor([0, 1, 2, 2])
    drawn = [sample_negatives(similarity, ids, 0.07, noise).tolist() for noise in rand(300, 4, 4)]
    rows = list(zip(*drawn, strict=True))
    assert [set(row) for row in rows[:1] + rows[2:]] == [{1, 2, 3}, {0, 1}, {0, 1}]
    assert set(rows[1]) == ({0, 3} if bad == -math.inf else {0, 2, 3})


def test_where_there_is_no_negative_nothing_fails() -> None:
    found = torch.stack([sample_negatives(torch.zeros(3, 3), torch.full((3,), 8), 0.07, n) for n in rand(100, 3, 3)])
    assert [set(column.tolist()) for column in found.T] == [{1, 2}, {0, 2}, {0, 1}]  # another row of the sample
    assert sample_negatives(torch.zeros(1, 1), torch.tensor([8]), 0.07).tolist() == [0]


def test_matching_takes_the_first_third_for_true() -> None:
    logits = 3 * rand(12, 2) - 1
    total = 0.0
    for row, (no, yes) in enumerate(logits.tolist()):
        right = yes if row < 4 else no
        total -= math.log(math.exp(right) / (math.exp(no) + math.exp(yes)))
    assert matching_loss(logits).item() == pytest.approx(total / 12, rel=1e-12)
    assert matching_loss(torch.zeros(3, 2)).item() == pytest.approx(math.log(2))
    with torch.autocast("cpu", torch.bfloat16):
        assert matching_loss(logits.bfloat16()).dtype == torch.float32
    for shape in ((4, 2), (3, 3), (3,)):
        with pytest.raises(ValueError, match=r"must be \[3B, 2\]"):
            matching_loss(torch.zeros(shape))
