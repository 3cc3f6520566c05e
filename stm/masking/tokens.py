"""Counts, ranks and indexes tokens, for strategies and for code that uses their masks."""

import math

import torch
from torch import Tensor


def count_masked(tokens: int, ratio: float) -> int:
    """The number of tokens to hide in a slot of `tokens`, rounded down as in VideoMAE: 176 of 196 at 0.9."""
    return int(ratio * tokens)


def hide_highest(score: Tensor, noise: Tensor, ratio: float) -> Tensor:
    """Hide the tokens with the highest score in each slot; the noise breaks ties.

    Args:
        score: [B, slots, N], any float dtype. NaN counts as the highest.
        noise: float [B, slots, N]; of two equal scores, the one with the higher noise is hidden.
        ratio: share of a slot's tokens to hide.

    Returns:
        Kept tokens, int64 [B, slots * (N - int(ratio * N))], ascending.
    """
    return keep_first(sort_by(score, noise), ratio)


def sort_by(*keys: Tensor) -> Tensor:
    """Sort positions by the first key, then by the second where the first is equal, and so on, ascending.

    Args:
        keys: [..., N] each, all of the same shape. NaN counts as the highest.

    Returns:
        int64 [..., N]; positions that are equal in all keys keep their order.
    """
    # One stable sort per key, the least important first, gives the exact lexicographic order. Adding a small
    # multiple of the noise to the score would reorder scores that differ by less.
    order = torch.argsort(keys[-1], dim=-1, stable=True)
    for key in reversed(keys[:-1]):
        order = order.gather(-1, torch.argsort(key.gather(-1, order), dim=-1, stable=True))
    return order


def keep_first(order: Tensor, ratio: float) -> Tensor:
    """Keep the first tokens of each slot's order, int64 [B, slots, N] -> int64 [B, K], ascending."""
    tokens = order.shape[-1]
    kept = order[..., : tokens - count_masked(tokens, ratio)].sort(dim=-1).values
    return number_tokens(kept, tokens)


def find_side(tokens: int) -> int:
    """Tokens per side of a slot's square grid.

    Raises:
        ValueError: the grid is not square.
    """
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise ValueError(
            f"a slot of {tokens} tokens is not a square grid; strategies that use positions need a square crop"
        )
    return side


def number_tokens(kept: Tensor, tokens: int) -> Tensor:
    """Positions within slots, int64 [B, slots, k] -> token indices within the clip, int64 [B, slots * k]."""
    first = torch.arange(kept.shape[1], device=kept.device) * tokens
    return (kept + first[:, None]).flatten(1)


def to_boolean(kept: Tensor, slots: int, tokens: int) -> Tensor:
    """Kept tokens, int64 [B, K] -> bool [B, slots, N], True where masked."""
    masked = torch.ones(kept.shape[0], slots * tokens, dtype=torch.bool, device=kept.device)
    return masked.scatter(1, kept, False).view(-1, slots, tokens)


def complement(kept: Tensor, total: int) -> Tensor:
    """Kept tokens, int64 [B, K] -> masked tokens, int64 [B, total - K], ascending."""
    hidden = torch.ones(kept.shape[0], total, dtype=torch.uint8, device=kept.device).scatter(1, kept, 0)
    # A stable sort by a flag lists the masked tokens in order and, unlike `nonzero`, has a static result shape.
    return torch.argsort(hidden, dim=1, descending=True, stable=True)[:, : total - kept.shape[1]]
