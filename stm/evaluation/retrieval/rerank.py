"""Re-ranking: the matching head sorts the dual encoder's best candidates, as in UMT's release.

A re-ranked pair is scored only by the head's "match" logit, without the similarity. Two cases that depend on a
candidate's position in the list in UMT's code are well defined here:

- Candidates with equal logits are sorted by the dual encoder's similarity; if the similarity ties too, they count as if
  their order were random (see `stm.evaluation.retrieval.ranking`). A constant matching head therefore leaves all ranks
  unchanged.
- Candidates that are not re-ranked follow the re-ranked ones, in the dual encoder's order. UMT assigns them the score
  -100, which leaves them in file order. Recalls do not depend on this if `depth` is at least 10.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stm.distributed.process import Process
from stm.distributed.shares import join_rows
from stm.evaluation.retrieval.ranking import TIED, recall_intervals, recall_metrics
from stm.jobs.progress import Progress
from stm.models.video_language import VideoLanguageModel

DEPTH = 128
"""Number of candidates per query that UMT re-ranks."""

EQUAL_LOGITS = 1e-5
"""Match logits that differ by less count as tied: about ten times float32's rounding difference between two batches."""

UNRANKED = -np.inf
"""The logit of a pair that is not re-ranked."""

Numbers = Sequence[NDArray[np.integer]]
"""The indices of the correct candidates of each query (at least one)."""

Score = Callable[[Tensor, int], Tensor]
"""Indices of texts, int64 [P], and of the video with which they are paired -> match logits, float [P]."""


class Reranked(NamedTuple):
    """Match logits of both directions, float32 [Q, V]; minus infinity where a pair is not re-ranked.

    A pair that is re-ranked in both directions is scored once and has the same logit in both. Only the selection of
    pairs differs.
    """

    text_to_video: NDArray[np.float32]  # logits of each text's (row's) best videos
    video_to_text: NDArray[np.float32]  # logits of each video's (column's) best texts


def match_score(model: VideoLanguageModel, states: Tensor, tokens: Tensor, features: Tensor) -> Score:
    """Returns the score for `rerank`: the model's "match" logit of pairs, before softmax.

    All texts of a call attend to one video, a batch of one, so that its keys and values are computed once.

    Args:
        model: in eval mode; pairs are moved to its device.
        states: float [Q, X, W], `encode_text` of all texts; may stay on the CPU.
        tokens: int64 [Q, X], tokens of the same texts.
        features: float [V, K, W], the encoder's features of all videos; may stay on the CPU.
    """
    device = next(model.parameters()).device

    @torch.no_grad()
    def score(texts: Tensor, video: int) -> Tensor:
        # Features computed in bfloat16 are stored so; the fusion layers are in the states' precision.
        parts = (states[texts], tokens[texts], features[video : video + 1].to(states.dtype))
        return model.match(*(part.to(device, non_blocking=True) for part in parts))[:, 1].float()

    return score


def rerank(
    similarity: NDArray[np.floating],
    score: Score,
    depth: int = DEPTH,
    batch: int = 64,
    process: Process | None = None,
    videos: Sequence[int] | None = None,
) -> Reranked:
    """Scores each text's `depth` most similar videos, and each video's most similar texts, with the matching head.

    Candidates that tie with the last of these are also scored (see `shortlist`): otherwise their position in the list
    would decide.

    Args:
        similarity: [Q texts, V videos], the dual encoder's cosines, finite.
        score: see `Score`; each pair is scored once, one video at a time.
        depth: candidates per query, at least 1.
        batch: pairs per call of `score`.
        process: one of several that share the videos and have the same similarity; None: the only one.
        videos: those that this process scores; None: all.

    Raises:
        ValueError: a similarity or a logit is not finite, or `score` returned a different shape.
    """
    by_text = shortlist(similarity, depth)
    by_video = shortlist(similarity.T, depth).T
    pairs = by_text | by_video
    logits = np.full(similarity.shape, UNRANKED, dtype=np.float32)
    own = list(range(similarity.shape[1]) if videos is None else videos)
    with Progress("re-ranking", total=int(pairs[:, own].sum()), unit="pairs") as progress:
        # Iterate over videos instead of texts: a video has more tokens to move and to project than a text.
        for video in own:
            texts = np.flatnonzero(pairs[:, video])
            for part in np.split(texts, range(batch, len(texts), batch)):
                logits[part, video] = _ask(score, part, video)
                progress.advance(len(part))
    if process is not None:
        columns = torch.from_numpy(np.ascontiguousarray(logits[:, own].T))
        logits = join_rows(process, torch.tensor(own, dtype=torch.int64), columns, len(logits.T)).numpy().T
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
    """True for the `depth` highest values of each row, and for any following values that tie, each with the previous
    one.

    Every unselected value is therefore lower than every selected value by more than `TIED`. Returns bool of the same
    shape.

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
    """The rank, from 1, of the best correct candidate of each query: by logit, with ties broken by similarity.

    Candidates that tie in both count as if their order were random: the rank is the mean over all orders.

    Args:
        similarity: [Q, C], cosines.
        right: see `Numbers`.
        logits: [Q, C], minus infinity for pairs that were not re-ranked; None: rank only by similarity.

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
    above[right] = False  # a correct candidate above the best correct one can only result from rounding
    # In random order, on average w / (m + 1) of w wrong candidates precede the first of m correct ones.
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
        ValueError: a video has no text, so that it would be a candidate but never a query.
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
        reranked: the result of `rerank`; None: metrics of the dual encoder.

    Returns:
        `text_to_video`, `video_to_text` (R@1, R@5, R@10, median and mean rank, see `recall_metrics`), `confidence95` of
        their recalls, and the numbers of `queries` and `clips`. A video's rank is that of its best text. The intervals
        use one trial per clip, because texts of the same clip are not independent; for text to video, one trial per
        text if there are fewer texts than clips.

    Raises:
        ValueError: a text has no video, or a video has no text.
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
