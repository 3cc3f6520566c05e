"""Retrieval metrics: the rank of the correct candidate, and recall at K."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from stm.evaluation.metrics import wilson_interval
from stm.evaluation.retrieval import DEPTHS

TIED = 1e-6
"""Cosines that differ by less count as tied. This is about ten times float32's rounding error, which depends on a
candidate's position in the list: without the tolerance, the position would decide. Packed text vectors are float16,
whose rounding error is larger."""

_ROWS = 1024


def rank_right(
    queries: NDArray[np.float32],
    candidates: NDArray[np.float32],
    right: Sequence[NDArray[np.integer]],
    left_out: NDArray[np.integer] | None = None,
) -> NDArray[np.float64]:
    """The rank, from 1, of the best correct candidate of each query, by cosine.

    Ties count as if their order were random: the rank is the mean over all orders. A model that returns the same vector
    for all candidates therefore ranks them in the middle of the list instead of at the top.

    Args:
        queries: [Q, D], unit vectors.
        candidates: [C, D], unit vectors.
        right: the indices of the correct candidates of each query (at least one).
        left_out: [Q], the candidate that each query may not find, such as itself; None: there are none.

    Returns:
        Float64 [Q].
    """
    ranks = np.empty(len(queries))
    # Process queries in blocks: the full similarity matrix may not fit into memory.
    for start in range(0, len(queries), _ROWS):
        scores = queries[start : start + _ROWS] @ candidates.T
        if left_out is not None:
            scores[np.arange(len(scores)), left_out[start : start + _ROWS]] = -np.inf
        for number, row in enumerate(scores, start=start):
            ranks[number] = _mean_rank(row, right[number])
    return ranks


def _mean_rank(scores: NDArray[np.float32], right: NDArray[np.integer]) -> float:
    best = scores[right].max()
    above = int((scores > best + TIED).sum())
    tied = int((scores >= best - TIED).sum()) - above
    right_tied = int((scores[right] >= best - TIED).sum())
    # In random order, on average w / (m + 1) of w wrong candidates precede the first of m correct ones.
    return 1 + above + (tied - right_tied) / (right_tied + 1)


def recall_metrics(ranks: NDArray[np.floating]) -> dict[str, float]:
    """R@1, R@5 and R@10 as shares, and the median and mean rank."""
    recalls = {f"r{depth}": float((ranks <= depth).mean()) for depth in DEPTHS}
    return {**recalls, "median_rank": float(np.median(ranks)), "mean_rank": float(ranks.mean())}


def recall_intervals(ranks: NDArray[np.floating], clips: int) -> dict[str, list[float]]:
    """Wilson 95 % intervals of R@1, R@5 and R@10, with one trial per clip.

    The captions of one clip are not independent trials; counting them as one trial yields conservative (wide)
    intervals.
    """
    # Successes can be fractional, because there are fewer trials (clips) than queries.
    shares = {f"r{depth}": float((ranks <= depth).mean()) for depth in DEPTHS}
    return {name: list(wilson_interval(share * clips, clips)) for name, share in shares.items()}
