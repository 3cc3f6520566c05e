"""Ranks and recalls against brute force, with ties and without; averaging of views."""

from collections.abc import Sequence
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stm.evaluation.features import average_probabilities, average_vectors, unit
from stm.evaluation.metrics import wilson_interval
from stm.evaluation.retrieval.ranking import rank_right, recall_intervals, recall_metrics


def draw_vectors(seed: int, rows: int, width: int = 8) -> np.ndarray:
    return unit(np.random.default_rng(seed).normal(size=(rows, width)))


def expected_rank(scores: Sequence[float], right: set[int]) -> float:
    """By trying all orders in which equal scores may come."""
    ranks = []
    for order in permutations(range(len(scores))):
        row = sorted(order, key=lambda candidate: -scores[candidate])  # keeps the order of equal ones
        ranks.append(1 + next(place for place, candidate in enumerate(row) if candidate in right))
    return float(np.mean(ranks))


@given(st.lists(st.integers(0, 2), min_size=2, max_size=6), st.data())
@settings(max_examples=60, deadline=None)
def test_a_rank_is_the_mean_over_all_orders_of_ties(levels: list[int], data: st.DataObject) -> None:
    right = data.draw(st.sets(st.integers(0, len(levels) - 1), min_size=1))
    angles = np.array(levels) / 2
    candidates = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    query = np.array([[0.0, 1.0]], dtype=np.float32)
    found = rank_right(query, candidates, [np.array(sorted(right))])
    assert found[0] == pytest.approx(expected_rank(levels, right))


@pytest.mark.parametrize("each", [1, 3])
def test_ranks_without_ties_are_places_in_the_sorted_list(each: int) -> None:
    """1,200 clips, so that the scores are taken in several parts."""
    clips, texts = draw_vectors(0, 1200), draw_vectors(1, 1200 * each)
    owners = np.repeat(np.arange(1200), each)
    scores = texts.astype(np.float64) @ clips.T.astype(np.float64)
    found = rank_right(texts, clips, list(owners[:, None]))
    expected = [np.flatnonzero(np.argsort(-row) == own)[0] + 1 for row, own in zip(scores, owners, strict=True)]
    # Cosines that are nearer than TIED are ties here, and in order there: a few ranks are off by a half for each.
    assert np.mean(found == expected) > 0.99 and np.abs(found - expected).max() <= 1
    found = rank_right(clips, texts, list(np.arange(1200 * each).reshape(1200, each)))
    expected = [np.flatnonzero(owners[np.argsort(-scores[:, clip])] == clip)[0] + 1 for clip in range(1200)]
    assert np.mean(found == expected) > 0.98 and np.abs(found - expected).max() <= 1


@pytest.mark.parametrize("each", [1, 4])
def test_a_constant_embedding_is_in_the_middle_and_not_at_the_top(each: int) -> None:
    clips, texts = np.repeat(draw_vectors(0, 1), 101, axis=0), draw_vectors(1, 101 * each)
    figures = recall_metrics(rank_right(texts, clips, list(np.repeat(np.arange(101), each)[:, None])))
    assert figures == {"r1": 0, "r5": 0, "r10": 0, "median_rank": 51, "mean_rank": 51}
    same = np.repeat(texts[:1], 101 * each, axis=0)
    ranks = rank_right(draw_vectors(2, 101), same, list(np.arange(101 * each).reshape(101, each)))
    # Of `each` own captions among all in random order the first has 100 each / (each + 1) others before it.
    np.testing.assert_allclose(ranks, 1 + 100 * each / (each + 1))


def test_rounding_breaks_no_tie() -> None:
    """The same vector at other places of the matrix gives scores that differ in the last digits."""
    candidates = np.tile(draw_vectors(0, 1, 512), (77, 1))
    candidates *= 1 + np.linspace(-1, 1, 77, dtype=np.float32)[:, None] * 1e-7
    assert (rank_right(draw_vectors(1, 5, 512), candidates, [np.array([3])] * 5) == 39).all()


def test_figures_of_a_small_case() -> None:
    ranks = np.array([1, 1.5, 5, 11, 2.0])
    figures = recall_metrics(ranks)
    assert figures == {"r1": 0.2, "r5": 0.8, "r10": 0.8, "median_rank": 2.0, "mean_rank": pytest.approx(4.1)}
    intervals = recall_intervals(ranks, 5)
    assert intervals["r1"] == list(wilson_interval(1, 5)) and intervals["r10"] == list(wilson_interval(4, 5))


def test_intervals_count_clips_and_not_their_captions() -> None:
    ranks = np.repeat([1.0, 20.0], 50)  # 20 clips with 5 captions each
    assert recall_intervals(ranks, 20)["r1"] == list(wilson_interval(10, 20))


def test_probabilities_are_averaged_after_softmax() -> None:
    logits = np.array([[[0.0, np.log(3)], [np.log(1), np.log(1)]], [[1000.0, 0.0], [-1000.0, 0.0]]])
    np.testing.assert_allclose(average_probabilities(logits), [[3 / 8, 5 / 8], [0.5, 0.5]])


def test_vectors_of_views_are_averaged_as_directions() -> None:
    views = np.array([[[2.0, 0.0], [0.0, 7.0]], [[0.0, 0.0], [0.0, 0.0]]])
    half = np.sqrt(0.5)
    np.testing.assert_allclose(average_vectors(views), [[half, half], [0, 0]], rtol=1e-6)
