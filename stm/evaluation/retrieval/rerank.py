"""Re-ranking: the matching head sorts the dual encoder's best candidates (UMT, section 1.2 of its release's retrieval).

The score of a re-ranked pair is the head's logit for "match" alone, without the similarity. Two things are defined here
that in UMT's code depend on the place of a candidate in the list:

- Equal logits are sorted by the dual encoder's similarity, and what is equal in that too counts as if its order were random
  (see `stm.evaluation.retrieval.ranking`). So a constant matching head changes no rank.
- All that is not re-ranked comes after all that is, in the dual encoder's order. UMT gives it the score -100, so that
  its order is that of the file. Recalls do not depend on this as long as `depth` is above 10.
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
"""Match logits that differ by less are equal: about ten times float32's rounding between two batches."""

UNRANKED = -np.inf
"""In place of a logit, for a pair that is not re-ranked."""

Numbers = Sequence[NDArray[np.integer]]
"""The numbers of the right candidates of each query, one or more."""

Score = Callable[[Tensor, int], Tensor]
"""Numbers of texts, int64 [P], and of the one video that each is paired with -> match logits, float [P]."""


class Reranked(NamedTuple):
    """Match logits of both directions, float32 [Q, V]; minus infinity where a pair is not re-ranked.

    Where both have a number it is the same one: a pair is scored once. They differ in which pairs are re-ranked.
    """

    text_to_video: NDArray[np.float32]  # of each text's (row's) best videos
    video_to_text: NDArray[np.float32]  # of each video's (column's) best texts


def match_score(model: VideoLanguageModel, states: Tensor, tokens: Tensor, seen: Tensor) -> Score:
    """The score for `rerank`: the model's "match" logit of pairs, before softmax.

    The video is a batch of one that all its texts attend to: its keys and values are computed once.

    Args:
        model: in eval mode; pairs are moved to its device.
        states: float [Q, X, W], `encode_text` of all texts; they may stay in the host's memory.
        tokens: int64 [Q, X], theirs.
        seen: float [V, K, W], the encoder's tokens of all videos; likewise.
    """
    device = next(model.parameters()).device

    @torch.no_grad()
    def score(texts: Tensor, video: int) -> Tensor:
        parts = (states[texts], tokens[texts], seen[video : video + 1])
        return model.match(*(part.to(device, non_blocking=True) for part in parts))[:, 1].float()

    return score


def rerank(similarity: NDArray[np.floating], score: Score, depth: int = DEPTH, batch: int = 64) -> Reranked:
    """Scores each text's `depth` most similar videos and each video's most similar texts by the matching head.

    Candidates that tie with the last of them are scored too (see `shortlist`): otherwise the place in the list would
    decide.

    Args:
        similarity: [Q texts, V videos], the dual encoder's cosines, finite.
        score: see `Score`; called once per pair, video after video.
        depth: candidates per query, 1 or more.
        batch: pairs per call of `score`.

    Raises:
        ValueError: a similarity or a logit is not finite, or `score` returned another shape.
    """
    by_text = shortlist(similarity, depth)
    by_video = shortlist(similarity.T, depth).T
    wanted = by_text | by_video
    logits = np.full(similarity.shape, UNRANKED, dtype=np.float32)
    with Progress("re-ranking", total=int(wanted.sum()), unit="pairs") as progress:
        for video in range(similarity.shape[1]):
            texts = np.flatnonzero(wanted[:, video])
            for part in np.split(texts, range(batch, len(texts), batch)):
                logits[part, video] = _ask(score, part, video)
                progress.advance(len(part))
    return Reranked(np.where(by_text, logits, UNRANKED), np.where(by_video, logits, UNRANKED))


def _ask(score: Score, texts: NDArray[np.int64], video: int) -> NDArray[np.float32]:
    found = score(torch.from_numpy(texts), video).detach().float().cpu().numpy()
    if found.shape != texts.shape:
        raise ValueError(
            f"the matching score of {len(texts)} pairs has the shape {found.shape}; one logit per pair is needed"
        )
    if not np.isfinite(found).all():
        raise ValueError("the matching head returned logits that are not finite: were the weights trained to the end?")
    return found


def shortlist(similarity: NDArray[np.floating], depth: int) -> NDArray[np.bool_]:
    """True for the `depth` highest of each row, and for those after them as long as each ties with the one before.

    So every one that is left out is less than every one that is in, by more than `TIED`. Bool, of the same shape.

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
    """The rank, from 1, of the best right candidate of each query: by the logit, where that ties by the similarity.

    Candidates that tie in both count as if their order were drawn: the rank is the mean over all orders.

    Args:
        similarity: [Q, C], cosines.
        right: see `Numbers`.
        logits: [Q, C], minus infinity for what was not re-ranked; None: rank by the similarity alone.

    Returns:
        Float64 [Q].

    Raises:
        ValueError: the shapes differ, or a query has no right candidate.
    """
    if len(right) != len(similarity) or (logits is not None and logits.shape != similarity.shape):
        raise ValueError("similarities, logits and right candidates must be of the same queries and candidates")
    ranks = np.empty(len(similarity))
    flat = np.zeros(similarity.shape[1], dtype=np.float32)
    for number, (row, numbers) in enumerate(zip(similarity, right, strict=True)):
        if not len(numbers):
            raise ValueError(f"query {number} has no right candidate: leave it out")
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
    above[right] = False  # none is better than the best but by rounding
    # Of m right and w wrong ones in random order, the first right one has w / (m + 1) wrong ones before it on average.
    return 1 + int(above.sum()) + (int(tied.sum()) - right_tied) / (right_tied + 1)


def _compare(
    values: NDArray[np.floating], value: np.floating, tied: float
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which of the values are higher than the one, and which are lower."""
    return values > value + tied, values + tied < value


def right_texts(right_videos: Numbers, videos: int) -> list[NDArray[np.int64]]:
    """The texts that are right for each video, from the videos that are right for each text.

    MSVD has several texts a video, SSv2-template several videos a text.

    Raises:
        ValueError: a video has no text: it would be found, and could not ask.
    """
    texts = np.repeat(np.arange(len(right_videos)), [len(numbers) for numbers in right_videos])
    owners = np.concatenate([np.asarray(numbers, dtype=np.int64) for numbers in right_videos])
    order = np.argsort(owners, kind="stable")
    found = np.split(texts[order], np.searchsorted(owners[order], np.arange(1, videos)))
    if lonely := sum(not len(numbers) for numbers in found):
        raise ValueError(f"{lonely} of {videos} videos have no text: leave them out")
    return found


def retrieval_metrics(
    similarity: NDArray[np.floating], right_videos: Numbers, reranked: Reranked | None = None
) -> dict[str, Any]:
    """Metrics of both directions, before or after re-ranking.

    Args:
        similarity: [Q texts, V videos], cosines.
        right_videos: the right videos of each text, one or more.
        reranked: what `rerank` returned; None: the dual encoder alone.

    Returns:
        `text_to_video`, `video_to_text` (R@1, R@5, R@10, median and mean rank, see `recall_metrics`), `confidence95` of
        their recalls, and the numbers of `queries` and `clips`. A video's rank is that of its best text. Trials of the
        intervals are clips, as texts of one clip are not independent; of text to video, texts where they are fewer.

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
