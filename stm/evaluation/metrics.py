"""Classification metrics: accuracies, their confidence intervals, accuracy per class."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

UNSEEN = -1
"""Class index of a test label that no training clip has: every prediction is wrong."""


def wilson_interval(successes: float, trials: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson's score interval of a proportion; 95 % with the default `z`.

    Unlike the plain normal interval it stays inside [0, 1] and is sound for few trials (Wilson 1927, J. Am.
    Stat. Assoc. 22). For no trials it is (0, 1).
    """
    if trials == 0:
        return 0.0, 1.0
    share, squared = successes / trials, z * z
    centre = (share + squared / (2 * trials)) / (1 + squared / trials)
    half = z / (1 + squared / trials) * math.sqrt(share * (1 - share) / trials + squared / (4 * trials**2))
    # At the ends the interval ends there exactly; only rounding says otherwise.
    return (0.0 if successes == 0 else centre - half), (1.0 if successes == trials else centre + half)


def top_accuracy(probabilities: NDArray[np.floating], targets: NDArray[np.integer], top: int) -> float:
    """Share of clips whose right class is among the `top` most probable ones; `top` is capped by the classes.

    Where classes tie at the border, a clip counts with the probability that its class would be drawn among them.
    """
    if not len(targets):
        return 0.0
    top = min(top, probabilities.shape[1])
    seen = targets != UNSEEN
    right = probabilities[np.arange(len(targets)), np.where(seen, targets, 0)][:, None]
    above = (probabilities > right).sum(1)
    tied = (probabilities == right).sum(1)
    return float((np.clip((top - above) / tied, 0.0, 1.0) * seen).mean())


def classification_metrics(
    probabilities: NDArray[np.floating], targets: NDArray[np.integer], labels: Sequence[str]
) -> dict[str, object]:
    """All metrics of a classification.

    Args:
        probabilities: `[n, classes]`, averaged over views.
        targets: `[n]`, class indices or `UNSEEN`.
        labels: names of the classes.

    Returns:
        `top1`, `top5` (shares), `top5_of` (5, or the classes when fewer), `classes`, `confidence95`
        (Wilson's, of top-1), `per_class` (label -> clips, correct, accuracy; null for classes without test
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
