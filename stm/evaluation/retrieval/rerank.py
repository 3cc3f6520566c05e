"""Re-ranking: the matching head sorts the dual encoder's best candidates (UMT's release).

The score of a re-ranked pair is the head's logit for "match" alone, without the similarity. Two things are defined here
that in UMT's code depend on the place of a candidate in the list:

- Candidates with equal logits are sorted by the dual encoder's similarity, and those that tie there too count as if their
  order were random (see `stm.evaluation.retrieval.ranking`). So a constant matching head changes no rank.
- Candidates that are not re-ranked come after all that are, in the dual encoder's order. UMT gives them the score -100, so
  that they are in the order of the file. Recalls do not depend on this as long as `depth` is at least 10.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stm.evaluation.retrieval.ranking import TIED, recall_intervals, recall_metrics
from stm.jobs.progress import Progress
from stm.models.video_language import VideoLanguageModel

DEPTH = 128
"""Candidates per query that UMT re-ranks."""

EQUAL_LOGITS = 1e-5
"""Match logits that differ by less count as tied: about ten times float32's rounding differences between two batches."""

UNRANKED = -np.inf
"""The logit of a pair that is not re-ranked."""

Numbers = Sequence[NDArray[np.integer]]
"""The numbers of the correct candidates of each query, at least one."""

Score = Callable[[Tensor, int], Tensor]
"""Numbers of texts, int64 [P], and of the one video that each is paired with -> match logits, float [P]."""


class Reranked(NamedTuple):
    """Match logits of both directions, float32 [Q, V]; minus infinity where a pair is not re-ranked.

    Both have the same logit for a pair that both re-rank, as it is scored once. They differ in which pairs they re-rank.
    """

    text_to_video: NDArray[np.float32]  # of each text's (row's) best videos
    video_to_text: NDArray[np.float32]  # of each video's (column's) best texts


def match_score(model: VideoLanguageModel, states: Tensor, tokens: Tensor, features: Tensor) -> Score:
    """The score for `rerank`: the model's "match" logit of pairs, before softmax.

    The video is a batch of one that all its texts attend to: its keys and values are computed once.

    Args:
        model: in eval mode; pairs are moved to its device.
        states: float [Q, X, W], `encode_text` of all texts; may stay on the CPU.
        tokens: int64 [Q, X], of the same texts.
        features: float [V, K, W], the encoder's features of all videos; may stay on the CPU.
    """
    device = next(model.parameters()).device

    @torch.no_grad()
    def score(texts: Tensor, video: int) -> Tensor:
        parts = (states[texts], tokens[texts], features[video : video + 1])
        return model.match(*(part.to(device, non_blocking=True) for part in parts))[:, 1].float()

    return score


def rerank(similarity: NDArray[np.floating], score: Score, depth: int = DEPTH, batch: int = 64) -> Reranked:
    """Scores each text's `depth` most similar videos, and each video's most similar texts, by the matching head.

    Candidates that tie with the last of these are scored too (see `shortlist`): otherwise their place in the list would
    decide.

    Args:
        similarity: [Q texts, V videos], the dual encoder's cosines, finite.
        score: see `Score`; called once per pair, video after video.
        depth: candidates per query, at least 1.
        batch: pairs per call of `score`.

    Raises:
        ValueError: a similarity or a logit is not finite, or `score` returned another shape.
    """
    by_text = shortlist(similarity, depth)
    by_video = shortlist(similarity.T, depth).T
    pairs = by_text | by_video
    logits = np.full(similarity.shape, UNRANKED, dtype=np.float32)
    with Progress("re-ranking", total=int(pairs.sum()), unit="pairs") as progress:
        # Video after video, not text after text: a video's tokens are the larger part to move and to project.
        for video in range(similarity.shape[1]):
            texts = np.flatnonzero(pairs[:, video])
            for part in np.split(texts, range(batch, len(texts), batch)):
                logits[part, video] = _ask(score, part, video)
                progress.advance(len(part))
    return Reranked(np.where(by_text, logits, UNRANKED), np.where(by_video, logits, UNRANKED))


def _ask(score: Score, texts: NDArray[np.int64], video: int) -> NDArray[np.float32]:
    logits = score(torch.from_numpy(texts), video).detach().float().cpu().numpy()
    if logits.shape != texts.shape:
        raise ValueError(
            f"the matching score of {len(texts)} pairs has the shape {logits.shape}; it must have one logit per pair"
        )
    if not np.isfinite(logits).all():
        raise ValueError("the matching head returned logits that are not finite: were the weights trained to the end?")
    return logits


def shortlist(similarity: NDArray[np.floating], depth: int) -> NDArray[np.bool_]:
    """True for the `depth` highest of each row, and for the next ones as long as each ties with the one before.

    So everything that is left out is lower than everything selected, by more than `TIED`. Bool, of the same shape.

    Raises:
        ValueError: a similarity is not finite, or `depth` is below 1.
    """
    if depth < 1:
        raise ValueError(f"depth {depth}: at least one candidate must be re-ranked")
    if not np.isfinite(similarity).all():
        raise ValueError("the dual encoder's similarities are not all finite: were the weights trained to the end?")
    if similarity.shape[1] <= depth:
        return np.ones(similarity.shape, dtype=np.bool_)
    ordered = np.sort(similarity, axis=1)[:, ::-1]
    drops = ordered[:, depth - 1 : -1] > ordered[:, depth:] + TIED
    last = np.where(drops.any(axis=1), depth - 1 + drops.argmax(axis=1), similarity.shape[1] - 1)
    return similarity >= np.take_along_axis(ordered, last[:, None], axis=1)


def rank_scores(
    similarity: NDArray[np.floating], right: Numbers, logits: NDArray[np.floating] | None = None
) -> NDArray[np.float64]:
    """The rank, from 1, of the best correct candidate of each query: by the logit, and where logits tie by the similarity.

    Candidates that tie in both count as if their order were random: the rank is the mean over all orders.

    Args:
        similarity: [Q, C], cosines.
        right: see `Numbers`.
        logits: [Q, C], minus infinity for pairs that were not re-ranked; None: rank by the similarity alone.

    Returns:
        Float64 [Q].

    Raises:
        ValueError: the shapes differ, or a query has no correct candidate.
    """
    if len(right) != len(similarity) or (logits is not None and logits.shape != similarity.shape):
        raise ValueError("similarities, logits and correct candidates must have the same queries and candidates")
    ranks = np.empty(len(similarity))
    flat = np.zeros(similarity.shape[1], dtype=np.float32)
    for number, (row, numbers) in enumerate(zip(similarity, right, strict=True)):
        if not len(numbers):
            raise ValueError(f"query {number} has no correct candidate: leave it out")
        ranks[number] = _mean_rank(row, flat if logits is None else logits[number], numbers)
    return ranks


def _mean_rank(similarity: NDArray[np.floating], logits: NDArray[np.floating], right: NDArray[np.integer]) -> float:
    leading = right[logits[right] >= logits[right].max() - EQUAL_LOGITS]
    best = leading[similarity[leading].argmax()]
    higher, lower = _compare(logits, logits[best], EQUAL_LOGITS)
    nearer, farther = _compare(similarity, similarity[best], TIED)
    equal = ~higher & ~lower
    tied = equal & ~nearer & ~farther
    above, right_tied = higher | (equal & nearer), int(tied[right].sum())
    above[right] = False  # a correct one above the best of them can only be a rounding error
    # With m correct and w wrong ones in random order, on average w / (m + 1) wrong ones precede the first correct one.
    return 1 + int(above.sum()) + (int(tied.sum()) - right_tied) / (right_tied + 1)


def _compare(
    values: NDArray[np.floating], value: np.floating, tied: float
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which of the values are higher than `value`, and which are lower, by more than `tied`."""
    return values > value + tied, values + tied < value


def right_texts(right_videos: Numbers, videos: int) -> list[NDArray[np.int64]]:
    """The correct texts of each video, from the correct videos of each text.

    MSVD has several texts per video, SSv2-template several videos per text.

    Raises:
        ValueError: a video has no text, so that it would be a candidate and not a query.
    """
    texts = np.repeat(np.arange(len(right_videos)), [len(numbers) for numbers in right_videos])
    owners = np.concatenate([np.asarray(numbers, dtype=np.int64) for numbers in right_videos])
    order = np.argsort(owners, kind="stable")
    texts_of_videos = np.split(texts[order], np.searchsorted(owners[order], np.arange(1, videos)))
    if missing := sum(not len(numbers) for numbers in texts_of_videos):
        raise ValueError(f"{missing} of {videos} videos have no text: leave them out")
    return texts_of_videos


def retrieval_metrics(
    similarity: NDArray[np.floating], right_videos: Numbers, reranked: Reranked | None = None
) -> dict[str, Any]:
    """Metrics of both directions, before or after re-ranking.

    Args:
        similarity: [Q texts, V videos], cosines.
        right_videos: the correct videos of each text, at least one.
        reranked: the result of `rerank`; None: the dual encoder alone.

    Returns:
        `text_to_video`, `video_to_text` (R@1, R@5, R@10, median and mean rank, see `recall_metrics`), `confidence95` of
        their recalls, and the numbers of `queries` and `clips`. A video's rank is that of its best text. The trials of the
        intervals are clips, as texts of the same clip are not independent; for text to video, texts where these are fewer.

    Raises:
        ValueError: a text has no video, or a video no text.
    """
    texts, videos = similarity.shape
    to_video, to_text = (reranked.text_to_video, reranked.video_to_text.T) if reranked else (None, None)
    video_ranks = rank_scores(similarity, right_videos, to_video)
    text_ranks = rank_scores(similarity.T, right_texts(right_videos, videos), to_text)
    return {
        "text_to_video": recall_metrics(video_ranks),
        "video_to_text": recall_metrics(text_ranks),
        "confidence95": {
            "text_to_video": recall_intervals(video_ranks, min(texts, videos)),
            "video_to_text": recall_intervals(text_ranks, videos),
        },
        "queries": texts,
        "clips": videos,
    }
