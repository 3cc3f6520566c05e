"""Classification figures against closed forms and brute force."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from stm.evaluation.metrics import UNSEEN, classification_metrics, top_accuracy, top_shares, wilson_interval


@given(st.integers(1, 500), st.data())
def test_wilson_limits_solve_the_score_equation(trials: int, data: st.DataObject) -> None:
    """The interval's ends are the proportions p with |share - p| = z sqrt(p (1 - p) / n): its definition."""
    successes = data.draw(st.integers(0, trials))
    share = successes / trials
    for limit in wilson_interval(successes, trials):
        distance = 1.959963984540054 * np.sqrt(limit * (1 - limit) / trials)
        assert abs(abs(share - limit) - distance) < 1e-9
    low, high = wilson_interval(successes, trials)
    assert 0 <= low <= share <= high <= 1


def test_wilson_is_the_published_example() -> None:
    # Newcombe 1998, Statistics in Medicine 17, table I, method 3: 81 of 263.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(0, 0) == (0.0, 1.0)


def brute_force(probabilities: NDArray[np.float64], targets: NDArray[np.int64], top: int) -> float:
    order = np.argsort(-probabilities, axis=1)[:, :top]
    return float(np.mean([t in row for t, row in zip(targets, order, strict=True)]))


@given(st.integers(0, 1000), st.integers(1, 12), st.integers(1, 8))
def test_top_accuracy_is_brute_force_without_ties(seed: int, classes: int, top: int) -> None:
    rng = np.random.default_rng(seed)
    probabilities, targets = rng.random((30, classes)), rng.integers(-1, classes, 30)
    assert top_accuracy(probabilities, targets, top) == pytest.approx(brute_force(probabilities, targets, top))


@pytest.mark.parametrize("top", [1, 2, 5])
def test_a_constant_model_is_at_chance(top: int) -> None:
    targets = np.arange(10) % 7
    constant = np.full((10, 7), 1 / 7)
    assert top_accuracy(constant, targets, top) == pytest.approx(top / 7)
    assert top_shares(constant, targets, top) == pytest.approx([top / 7] * 10)


def test_figures_of_a_small_case() -> None:
    probabilities = np.array([[0.7, 0.2, 0.1], [0.3, 0.4, 0.3], [0.5, 0.3, 0.2], [0.1, 0.1, 0.8]])
    targets = np.array([0, 0, 2, UNSEEN])
    found = classification_metrics(probabilities, targets, ["a", "b", "c"])
    assert found["top1"] == 0.25 and found["top5"] == 0.75 and found["top5_of"] == 3
    assert found["classes"] == 3 and found["chance"] == pytest.approx(1 / 3)
    assert found["confidence95"] == list(wilson_interval(1, 4))
    assert found["per_class"] == {
        "a": {"clips": 2, "correct": 1, "accuracy": 0.5},
        "b": {"clips": 0, "correct": 0, "accuracy": None},
        "c": {"clips": 1, "correct": 0, "accuracy": 0.0},
    }
