"""Spatio-temporal masking (STM): hide what moves from frame to frame and what a teacher attends to.

A network compares each pair of adjacent frames and predicts one point per frame: the position of the moving object. A soft
blob around the points is a frame's temporal score; the teacher's attention is its spatial score; a learned weight mixes
them. Gumbel noise turns the scores into a sample, and the tokens with the highest noisy score are hidden. The network and
the weight are in stm/models/spatiotemporal/mask.py; this module contains the strategy, which only ranks, and the pure
functions.

This is a reimplementation of the formulas of the released code. Two of its peculiarities are kept and documented: the constant
added to a blob (`draw_blobs`), and the last frame's blob (`merge_pairs`). Others are options, `as_released` (`perturb`,
`rank_as_released`; see `stm.config.SpatioTemporal`).
"""

import math
from typing import Literal

import torch
from torch import Tensor

from stm.masking import Guides, hide_highest, register, to_boolean

Sampling = Literal["as_released", "log_probability"]

PLATEAU = 0.25  # half the side of the square on which a blob is maximal; coordinates range from -1 to 1
SLOPE = 1.5  # decrease of a blob per unit of distance outside that square


@register("spatiotemporal", needs=("spatiotemporal",))
def spatiotemporal(guides: Guides, ratio: float) -> Tensor:
    """Hide each frame's highest scores; the noise breaks ties. Kept tokens, int64 [B, K]."""
    return hide_highest(guides["spatiotemporal"], guides["noise"], ratio)


def jitter(points: Tensor, spread: float) -> Tensor:
    """Return nine points per point: itself and its eight neighbours at a distance of `spread`.

    Args:
        points: [..., 2], x and y.
        spread: in half frames; 0.2 in the released code, which also jitters outside of training.

    Returns:
        [..., 9, 2], in row-major order.
    """
    step = torch.arange(-1, 2, device=points.device, dtype=points.dtype) * spread
    offsets = torch.stack([step.repeat(3), step.repeat_interleave(3)], dim=-1)
    return points[..., None, :] + offsets


def draw_blobs(points: Tensor, side: int) -> Tensor:
    """Draw a map per point: g(x - its x) * g(y - its y) at the token positions, `side` equidistant values from -1 to 1.

    g(d) is 2 up to a distance of 0.25, then decreases by 1.5 per unit down to 1. The constant 1 is a leftover term of the
    released code; without it, tokens far from the point would have 0 instead of 1.

    Args:
        points: float [..., 2], x (column) and y (row) in half frames; (0, 0) is the centre.
        side: tokens per side, 2 or more.

    Returns:
        [..., side * side], from 1 to 4, in row-major order; differentiable in the points.
    """
    axis = torch.linspace(-1, 1, side, device=points.device, dtype=points.dtype)
    beyond = ((axis - points[..., None]).abs() - PLATEAU).clamp(min=0)  # [..., 2, side]
    height = 1 + (1 - SLOPE * beyond).clamp(min=0)
    column, row = height.unbind(-2)
    return (row[..., :, None] * column[..., None, :]).flatten(-2)


def average_blobs(points: Tensor, side: int, spread: float) -> Tensor:
    """Average the maps of the nine jittered points: [..., 2] -> [..., side * side]."""
    return draw_blobs(jitter(points, spread), side).mean(dim=-2)


def merge_pairs(former: Tensor, latter: Tensor, last: Literal["former", "latter"]) -> Tensor:
    """Merge values of pairs of adjacent frames into one value per frame.

    The first frame is in one pair and gets its `former` value. A middle frame is in two pairs and gets the mean. The last
    frame should get the last pair's `latter` value, and does so in the decoder; in the mask, the released code uses the
    `former` value instead.

    Args:
        former: [B, T - 1, ...], values of the first frame of each pair; at least one pair.
        latter: the same for the second frame of each pair.
        last: which value of the last pair the last frame gets.

    Returns:
        [B, T, ...].
    """
    end = former[:, -1:] if last == "former" else latter[:, -1:]
    return torch.cat([former[:, :1], (former[:, 1:] + latter[:, :-1]) / 2, end], dim=1)


def mixture_probability(mixture: Tensor, sampling: Sampling) -> Tensor:
    """Normalise the mixture of temporal and spatial scores to a probability per token of a frame.

    Args:
        mixture: float [..., N], with any sum; non-negative for `log_probability`.
        sampling: `as_released` applies a softmax to the mixture, although it already consists of probabilities;
            `log_probability` divides by the sum.

    Returns:
        [..., N], non-negative, with sum 1 (or sum 0 for `log_probability` if the whole mixture is 0).
    """
    if sampling == "as_released":
        return mixture.softmax(dim=-1)
    return mixture / mixture.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(mixture.dtype).tiny)


def perturb(probability: Tensor, noise: Tensor, sampling: Sampling) -> Tensor:
    """Return the score to rank: Gumbel noise added to the probabilities or to their logarithms.

    With `log_probability` (which we infer to be intended) the top k are k samples without replacement in proportion to the
    probabilities, as from `torch.multinomial`. With `as_released`, noise with a standard deviation of 1.28 is added to
    probabilities of about 1/196, so that the scores hardly matter: see `divergence`. The released ranking of the noisy
    scores is `rank_as_released`.

    Args:
        probability: float [..., N], from `mixture_probability` with the same sampling.
        noise: float [..., N], uniform in [0, 1).
        sampling: `log_probability` or `as_released`, as described above.

    Returns:
        [..., N], finite.
    """
    info = torch.finfo(noise.dtype)
    # The score must stay finite at both ends for the softmax; noise can be exactly 1 after rounding to fewer bits.
    gumbel = -torch.log(-torch.log(noise.clamp(info.tiny, 1 - info.eps / 2)))
    return (probability if sampling == "as_released" else _log(probability)) + gumbel


def rank_as_released(score: Tensor, temperature: float) -> Tensor:
    """Lower the scores that the released code cannot tell apart, so that their ranking is the released one.

    That code ranks the softmax of score / temperature in float32, where tokens about 5.2 below the highest score (at a
    temperature of 0.05) underflow to 0. They are half of 196 tokens, and in three of four frames more than ratio 0.7 keeps.
    `torch.topk` takes equal values in the order of their index on CUDA, so the first of them are hidden: the top of a frame
    more often than its bottom [INF: read in PyTorch's kernel, not run].

    Args:
        score: float [..., N], from `perturb` with `as_released`.
        temperature: above 0; 0.05 in the released code.

    Returns:
        [..., N], finite: `score`, but for tokens that underflow, below all others and descending with the index.
    """
    underflows = (score.detach().float() / temperature).softmax(dim=-1) == 0
    index = torch.arange(1, score.shape[-1] + 1, device=score.device, dtype=score.dtype)
    return torch.where(underflows, score.detach().amin(dim=-1, keepdim=True) - index, score)


def straight_through(score: Tensor, noise: Tensor, ratio: float, temperature: float) -> Tensor:
    """Return the mask as floats with a gradient: 1 where `spatiotemporal` hides a token, else 0.

    The mask itself has no gradient, so that of a softmax over the frame's scores divided by the temperature is used. The
    temperature affects this gradient but not the mask.

    Args:
        score: float [B, T, N], from `perturb`, or `rank_as_released` of it.
        noise: float [B, T, N], the noise that the strategy gets.
        ratio: share of a frame's tokens to hide.
        temperature: above 0; 0.05 in the released code.

    Returns:
        [B, T, N], exactly 0 or 1.
    """
    kept = hide_highest(score.detach(), noise, ratio)
    hidden = to_boolean(kept, score.shape[1], score.shape[2]).to(score.dtype)
    soft = (score / temperature).softmax(dim=-1)
    # The difference is computed first: it is exactly 0, whereas 1 - soft + soft may be inexact because of rounding.
    return hidden + (soft - soft.detach())


def divergence(probability: Tensor, sampling: Sampling) -> Tensor:
    """KL(p || uniform) in nats, averaged over clips and frames, where p is the distribution of a frame's first hidden token
    (the one with the highest score): a measure of how far the mask is from a uniform one.

    Token i has the highest score plus Gumbel noise with probability softmax(scores)_i. So p is the softmax of the
    probabilities for `as_released`, and the probabilities themselves for `log_probability`. Further tokens are sampled in
    the same way from the remaining ones: 0 means a uniformly random mask, log N a mask whose first token is certain. Since
    p is known, the divergence is exact: KL = log N + sum p log p.

    Args:
        probability: float [..., N], from `mixture_probability` with the same sampling.
        sampling: as in `perturb`.

    Returns:
        A scalar of the same dtype, without gradient, in [0, log N] up to rounding errors.
    """
    parts = probability.detach()
    log_first = parts.log_softmax(dim=-1) if sampling == "as_released" else _log(parts)
    return math.log(parts.shape[-1]) + (log_first.exp() * log_first).sum(dim=-1).mean()


def _log(probability: Tensor) -> Tensor:
    """The logarithm, but finite at 0, so that a token with probability 0 is hidden after all others."""
    return torch.log(probability.clamp(min=torch.finfo(probability.dtype).tiny))
