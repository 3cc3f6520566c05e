"""Which rows of a batch are positives of each other, for contrast and matching."""

from collections.abc import Sequence
from hashlib import blake2b

import torch
from torch import Tensor


def find_positives(rows: Tensor, columns: Tensor) -> Tensor:
    """True where a row and a column have an id in common.

    Args:
        rows: int64 [B], one id per sample, or [B, I], I ids per sample, which are compared one by one.
        columns: int64 [C], or [C, I].

    Returns:
        Bool [B, C].
    """
    equal = rows[:, None] == columns
    return equal.any(dim=2) if equal.dim() == 3 else equal


def hash_captions(captions: Sequence[str]) -> Tensor:
    """An id per caption, int64 [B]; equal texts have equal ids, in every process."""
    hashes = [blake2b(caption.encode(), digest_size=8).digest() for caption in captions]
    return torch.tensor([int.from_bytes(value, "big", signed=True) for value in hashes], dtype=torch.int64)
