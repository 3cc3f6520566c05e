"""Re-ranking against a loop over all orders, with ties and several right answers; a head that says nothing."""

from itertools import permutations
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from stm.evaluation.features import unit
from stm.evaluation.metrics import wilson_interval
from stm.evaluation.retrieval.ranking import rank_right
from stm.evaluation.retrieval.rerank import (
    UNRANKED,
    Reranked,
    match_score,
    rank_scores,
    rerank,
    retrieval_metrics,
    right_texts,
    shortlist,
)
from stm.models.video_language import VideoLanguageModel


def draw(seed: int, *shape: int, levels: int | None = None) -> np.ndarray:
    """Float32 similarities in [-1, 1]; of few values where `levels` is given, so that many tie."""
    generator = np.random.default_rng(seed)
    values = generator.uniform(-1, 1, shape) if levels is None else generator.integers(0, levels, shape) / levels
    return values.astype(np.float32)


def table(logits: np.ndarray, asked: list[tuple[int, int]] | None = None):
    """A matching head that looks its logits up, and notes what it was asked."""

    def score(texts: Tensor, video: int) -> Tensor:
        if asked is not None:
            asked.extend((text, video) for text in texts.tolist())
        return torch.from_numpy(logits)[texts, video]

    return score


def expected_rank(keys: list[tuple[float, float]], right: set[int]) -> float:
    """The mean place of the first right one over all orders that the keys allow."""
    ranks = []
    for order in permutations(range(len(keys))):
        row = sorted(order, key=lambda candidate: (-keys[candidate][0], -keys[candidate][1]))
        ranks.append(1 + next(place for place, candidate in enumerate(row) if candidate in right))
    return float(np.mean(ranks))


def expected_logits(similarity: np.ndarray, logits: np.ndarray, depth: int) -> np.ndarray:
    """Row by row: the head's logit where no `depth` others are more similar, else minus infinity."""
    found = np.full_like(similarity, UNRANKED)
    for row in range(similarity.shape[0]):
        for column in range(similarity.shape[1]):
            if sum(similarity[row] > similarity[row, column]) < depth:
                found[row, column] = logits[row, column]
    return found


@given(st.integers(0, 10_000), st.data())
@settings(max_examples=25, deadline=None)
def test_ranks_are_the_mean_over_all_orders_of_what_ties_in_logit_and_similarity(
    seed: int, data: st.DataObject
) -> None:
    """6 texts, 5 videos, three levels of everything; some texts mean several videos."""
    similarity, logits = draw(seed, 6, 5, levels=3), draw(seed + 1, 6, 5, levels=3)
    depth = data.draw(st.integers(1, 6))
    videos = [{number % 5} | data.draw(st.sets(st.integers(0, 4), max_size=2)) for number in range(6)]
    texts = [{text for text in range(6) if video in videos[text]} for video in range(5)]
    found = rerank(similarity, table(logits), depth, batch=4)
    right = [np.array(sorted(numbers)) for numbers in videos]
    for values, cosines, scores, own in (
        (found.text_to_video, similarity, logits, videos),
        (found.video_to_text.T, similarity.T, logits.T, texts),
    ):
        keys = expected_logits(cosines, scores, depth)
        np.testing.assert_array_equal(values, keys)
        expected = [expected_rank(list(zip(keys[n], cosines[n], strict=True)), own[n]) for n in range(len(own))]
        numbers = [np.array(sorted(one)) for one in own]
        np.testing.assert_allclose(rank_scores(cosines, numbers, values), expected)
    assert [set(one.tolist()) for one in right_texts(right, 5)] == texts


@pytest.mark.parametrize("levels", [None, 4, 1])
@pytest.mark.parametrize("depth", [1, 5, 100])
def test_a_constant_matching_head_changes_nothing(levels: int | None, depth: int) -> None:
    """With ties and without them, and where the dual encoder is constant too; 2 texts a video."""
    similarity = draw(0, 60, 30, levels=levels)
    right = list((np.arange(60) // 2)[:, None])
    found = rerank(similarity, lambda texts, video: torch.full(texts.shape, 0.3), depth)
    assert retrieval_metrics(similarity, right, found) == retrieval_metrics(similarity, right)
    np.testing.assert_array_equal(rank_scores(similarity, right, found.text_to_video), rank_scores(similarity, right))


def test_without_logits_the_ranks_are_those_of_the_dual_encoder() -> None:
    texts, clips = unit(draw(1, 50, 8)), unit(draw(2, 20, 8))
    right = [np.array([number % 20, (number + 3) % 20]) for number in range(50)]
    np.testing.assert_allclose(rank_scores(texts @ clips.T, right), rank_right(texts, clips, right))


def test_a_perfect_head_puts_what_is_right_first_if_it_is_short_listed() -> None:
    similarity = draw(3, 40, 40)
    found = rerank(similarity, table(np.eye(40, dtype=np.float32)), depth=10)
    before = rank_scores(similarity, list(np.arange(40)[:, None]))
    after = rank_scores(similarity, list(np.arange(40)[:, None]), found.text_to_video)
    np.testing.assert_array_equal(after, np.where(before <= 10, 1, before))
    assert (before > 10).any() and (before <= 10).any()


def test_each_pair_is_scored_once_and_video_after_video() -> None:
    similarity = draw(4, 30, 20)
    asked: list[Any] = []
    found = rerank(similarity, table(draw(5, 30, 20), asked), depth=4, batch=7)
    expected = set()
    for text in range(30):
        expected |= {(text, int(video)) for video in np.argsort(-similarity[text])[:4]}
    for video in range(20):
        expected |= {(int(text), video) for text in np.argsort(-similarity[:, video])[:4]}
    assert set(asked) == expected and len(asked) == len(expected)
    assert [video for _, video in asked] == sorted(video for _, video in asked)
    assert (np.isfinite(found.text_to_video).sum(1) == 4).all() and (np.isfinite(found.video_to_text).sum(0) == 4).all()
    assert found.text_to_video.dtype == found.video_to_text.dtype == np.float32


def test_what_ties_with_the_last_of_the_short_list_is_in_it() -> None:
    rows = np.array([[0.9, 0.5, 0.5 + 5e-7, 0.5 - 5e-7, 0.1], [0.1, 0.2, 0.3, 0.4, 0.5]], dtype=np.float32)
    expected = [[True, True, True, True, False], [False, False, False, True, True]]
    np.testing.assert_array_equal(shortlist(rows, 2), expected)
    assert shortlist(rows, 5).all() and shortlist(rows, 9).all()


def test_figures_of_a_small_case_with_several_right_ones() -> None:
    """Text 2 means both videos, video 0 has the texts 0 and 2; the logits turn text 0's order over."""
    similarity = np.array([[0.2, 0.9], [0.8, 0.1], [0.3, 0.4]], dtype=np.float32)
    logits = np.array([[2.0, 1.0], [3.0, 1.0], [5.0, 0.0]], dtype=np.float32)
    right = [np.array([0]), np.array([1]), np.array([0, 1])]
    before, after = (retrieval_metrics(similarity, right, found) for found in (None, Reranked(logits, logits)))
    assert before["text_to_video"]["mean_rank"] == pytest.approx((2 + 2 + 1) / 3)
    assert before["video_to_text"]["mean_rank"] == pytest.approx((2 + 2) / 2)
    assert after["text_to_video"]["r1"] == pytest.approx(2 / 3) and after["text_to_video"]["median_rank"] == 1
    # Video 0: its text 2 leads. Video 1: texts 0 and 1 tie at 1, text 0 (wrong) is nearer.
    assert after["video_to_text"] == {"r1": 0.5, "r5": 1, "r10": 1, "median_rank": 1.5, "mean_rank": 1.5}
    assert after["confidence95"]["text_to_video"]["r1"] == list(wilson_interval(2 / 3 * 2, 2))
    assert (after["queries"], after["clips"]) == (3, 2)


class Matcher(nn.Module):
    """Stands in for a video-language model: the logit of a match is a product of all that a pair has."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def match(self, states: Tensor, tokens: Tensor, seen: Tensor) -> Tensor:
        match = self.scale * states.sum((1, 2)) * tokens.sum(1) * seen.sum((1, 2))
        return torch.stack([torch.full_like(match, 9.0), match], dim=1)


def test_the_model_is_asked_for_the_logit_of_a_match_of_each_pair() -> None:
    generator = torch.Generator().manual_seed(0)
    states, seen = torch.rand(5, 3, 4, generator=generator), torch.rand(6, 2, 4, generator=generator)
    tokens = torch.randint(1, 9, (5, 3), generator=generator)
    found = rerank(
        draw(6, 5, 6), match_score(cast(VideoLanguageModel, Matcher()), states, tokens, seen), depth=3, batch=4
    )
    expected = 2 * (states.sum((1, 2)) * tokens.sum(1))[:, None] * seen.sum((1, 2))
    ranked = np.isfinite(found.text_to_video)
    np.testing.assert_allclose(found.text_to_video[ranked], expected.numpy()[ranked], rtol=1e-5)
    assert ranked.sum() == 15


def test_what_cannot_be_ranked_is_refused() -> None:
    similarity = draw(7, 4, 4)
    with pytest.raises(ValueError, match="not all finite"):
        rerank(np.full((2, 2), np.nan, dtype=np.float32), table(similarity))
    with pytest.raises(ValueError, match="logits that are not finite"):
        rerank(similarity, table(similarity * np.nan))
    with pytest.raises(ValueError, match="one logit per pair"):
        rerank(similarity, lambda texts, video: torch.zeros(len(texts), 2))
    with pytest.raises(ValueError, match="at least one candidate"):
        rerank(similarity, table(similarity), depth=0)
    with pytest.raises(ValueError, match="query 1 has no correct"):
        rank_scores(similarity, [np.array([0]), np.array([], dtype=int), np.array([0]), np.array([0])])
    with pytest.raises(ValueError, match="have the same queries"):
        rank_scores(similarity, [np.array([0])])
    with pytest.raises(ValueError, match="1 of 4 videos have no text"):
        retrieval_metrics(similarity, [np.array([0]), np.array([1]), np.array([2]), np.array([2])])
