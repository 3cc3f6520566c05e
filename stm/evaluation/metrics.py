"""Classification metrics: accuracies, their confidence intervals, and accuracy per class; when two answers are equal."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

UNSEEN = -1
"""Class index of a test label that does not occur in training: any prediction is wrong."""


def wilson_interval(successes: float, trials: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson score interval of a proportion; 95 % with the default `z`.

    Unlike the normal approximation, it stays inside [0, 1] and is accurate for few trials (Wilson 1927, J. Am. Stat.
    Assoc. 22). Without trials, it is (0, 1).
    """
    if trials == 0:
        return 0.0, 1.0
    share, squared = successes / trials, z * z
    centre = (share + squared / (2 * trials)) / (1 + squared / trials)
    half = z / (1 + squared / trials) * math.sqrt(share * (1 - share) / trials + squared / (4 * trials**2))
    # Without successes (failures), the lower (upper) bound is exactly 0 (1), which rounding would miss.
    return (0.0 if successes == 0 else centre - half), (1.0 if successes == trials else centre + half)


def top_accuracy(probabilities: NDArray[np.floating], targets: NDArray[np.integer], top: int) -> float:
    """Share of clips whose correct class is among the `top` most probable ones, or among all if there are fewer.

    If classes tie for the last ranks, a clip counts as the probability that its class is among them in a random order.
    """
    return float(top_shares(probabilities, targets, top).mean()) if len(targets) else 0.0


def top_shares(probabilities: NDArray[np.floating], targets: NDArray[np.integer], top: int) -> NDArray[np.float64]:
    """What each clip counts in `top_accuracy`: 1, 0, or a probability if classes tie; float64 `[n]`."""
    top = min(top, probabilities.shape[1])
    known = targets != UNSEEN
    correct = probabilities[np.arange(len(targets)), np.where(known, targets, 0)][:, None]
    above = (probabilities > correct).sum(1)
    tied = (probabilities == correct).sum(1)
    shares: NDArray[np.float64] = np.clip((top - above) / tied, 0.0, 1.0) * known
    return shares


def classification_metrics(
    probabilities: NDArray[np.floating], targets: NDArray[np.integer], labels: Sequence[str]
) -> dict[str, object]:
    """Computes all classification metrics.

    Args:
        probabilities: `[n, classes]`, averaged over views.
        targets: `[n]`, class indices or `UNSEEN`.
        labels: class names, in the order of the columns.

    Returns:
        `top1`, `top5` (shares), `top5_of` (5, or the number of classes if smaller), `classes`, `chance`, `confidence95`
        (Wilson interval of top-1), `per_class` (label -> clips, correct, accuracy; null for classes without test
        clips).
    """
    predicted = probabilities.argmax(1) if len(targets) else np.zeros(0, dtype=np.int64)
    correct = predicted == targets
    per_class = {}
    for index, label in enumerate(labels):
        members = targets == index
        count, hits = int(members.sum()), int((correct & members).sum())
        per_class[label] = {"clips": count, "correct": hits, "accuracy": hits / count if count else None}
    return {
        "top1": float(correct.mean()) if len(targets) else 0.0,
        "top5": top_accuracy(probabilities, targets, 5),
        "top5_of": min(5, len(labels)),
        "classes": len(labels),
        "chance": 1 / len(labels),
        "confidence95": list(wilson_interval(int(correct.sum()), len(targets))),
        "per_class": per_class,
    }


def normalise(answer: str) -> str:
    """Normalises an answer to a question for comparison: lower case, single spaces."""
    return " ".join(answer.lower().split())
