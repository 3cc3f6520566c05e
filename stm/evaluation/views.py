"""From the views of a clip to one answer."""

import numpy as np
from numpy.typing import NDArray


def average_probabilities(logits: NDArray[np.floating]) -> NDArray[np.float32]:
    """Softmax of each view, then the mean, as VideoMAE tests: [clips, views, classes] -> float32 [clips, classes]."""
    powers = np.exp(logits - logits.max(-1, keepdims=True), dtype=np.float64)
    return (powers / powers.sum(-1, keepdims=True)).mean(1).astype(np.float32)


def average_vectors(vectors: NDArray[np.floating]) -> NDArray[np.float32]:
    """The direction between the views' unit vectors: [clips, views, D] -> float32 [clips, D], each of length 1."""
    return unit(unit(vectors).sum(1, dtype=np.float64))


def unit(vectors: NDArray[np.floating]) -> NDArray[np.float32]:
    """Vectors [..., D] brought to length 1, float32; zeros stay zeros."""
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=-1, keepdims=True)
    return (vectors / np.where(lengths == 0, 1, lengths)).astype(np.float32)
