"""Multiple choice: which of a few texts belongs to a clip (MSRVTT-MC; UMT, section 1.2)."""

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from stm.evaluation.metrics import top_accuracy, wilson_interval

MATCH_WEIGHT, SIMILARITY_WEIGHT = 0.7, 0.3  # UMT's release


def choice_scores(
    similarity: Tensor,
    match: Tensor,
    match_weight: float = MATCH_WEIGHT,
    similarity_weight: float = SIMILARITY_WEIGHT,
) -> Tensor:
    """Scores of the texts of a clip: `match_weight` x probability of a match + `similarity_weight` x cosine.

    Args:
        similarity: float [B, A], cosines of each clip and its A texts, not divided by a temperature.
        match: float [B, A, 2], the matching head's logits of the same pairs; index 1 is a match.
        match_weight, similarity_weight: UMT's by default.

    Returns:
        Float32 [B, A].

    Raises:
        ValueError: the shapes do not fit.
    """
    if match.shape != (*similarity.shape, 2) or similarity.dim() != 2:
        raise ValueError(f"similarity {tuple(similarity.shape)} must be [B, A], match {tuple(match.shape)} [B, A, 2]")
    probability = match.float().softmax(dim=-1)[..., 1]
    return torch.add(match_weight * probability, similarity.float(), alpha=similarity_weight)


def choosing_figures(scores: Tensor, right: NDArray) -> dict[str, Any]:
    """How often the text of highest score is the right one.

    Args:
        scores: float [B, A], finite.
        right: int [B], the number of the right text of each clip.

    Returns:
        `accuracy` (where the right text ties with others it counts with the chance that it would be drawn),
        `confidence95` (Wilson's), `questions`, and `chance`.

    Raises:
        ValueError: a score is not finite, or a number is not that of a text.
    """
    if not bool(scores.isfinite().all()):
        raise ValueError("the scores are not all finite: were the weights trained to the end?")
    if right.shape != scores.shape[:1] or ((right < 0) | (right >= scores.shape[1])).any():
        raise ValueError(f"the right texts must be {len(scores)} numbers from 0 to {scores.shape[1] - 1}")
    accuracy = top_accuracy(scores.cpu().numpy(), right, 1)
    return {
        "accuracy": accuracy,
        "confidence95": list(wilson_interval(accuracy * len(right), len(right))),
        "questions": len(right),
        "chance": 1 / scores.shape[1],
    }
