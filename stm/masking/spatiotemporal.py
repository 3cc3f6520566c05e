"""Spatio-temporal masking (STM): hide what moves from frame to frame and what a teacher looks at.

A network looks at each pair of adjacent frames and says where in either frame the moving thing is: a point. A soft
blob around the points is a frame's temporal score; the teacher's attention is its spatial score; a learned share
mixes them. Gumbel noise makes a draw of it, and the tokens of the highest noisy score are hidden. The network and
the share are in stm/models/spatiotemporal/mask.py; here are the strategy, which only ranks, and the pure functions.

Written from the formulas of the released code. Two of its ways are kept and named: the constant that it adds to a
blob, and the last frame's blob (`merge_pairs`). A third is the option `as_released` (`perturb`).
"""

import math
from typing import Literal

import torch
from torch import Tensor

from stm.masking import Guides, hide_highest, register, to_boolean

Sampling = Literal["as_released", "log_probability"]

PLATEAU = 0.25  # half side of the square in which a blob is at its height; coordinates run from -1 to 1
SLOPE = 1.5  # a blob's fall outside of it


@register("spatiotemporal", needs=("spatiotemporal",))
def spatiotemporal(guides: Guides, ratio: float) -> Tensor:
    """Kept tokens, int64 [B, K]: hidden are each frame's highest scores; the noise decides between equal ones."""
    return hide_highest(guides["spatiotemporal"], guides["noise"], ratio)


def jitter(points: Tensor, spread: float) -> Tensor:
    """Nine points around each: itself and its neighbours `spread` apart.

    Args:
        points: [..., 2], x and y.
        spread: in half frames; 0.2 in the released code, where the jitter is on also outside of training.

    Returns:
        [..., 9, 2], row by row.
    """
    step = torch.arange(-1, 2, device=points.device, dtype=points.dtype) * spread
    offsets = torch.stack([step.repeat(3), step.repeat_interleave(3)], dim=-1)
    return points[..., None, :] + offsets


def draw_blobs(points: Tensor, side: int) -> Tensor:
    """A map of each point: g(x - its x) times g(y - its y) at the tokens' places, `side` steps from -1 to 1.

    g(d) is 2 up to a distance of 0.25, falls from there by 1.5 a unit, and stays at 1. The 1 is a term of the
    released code that has lost its meaning there; without it tokens far from the point would have 0, not 1.

    Args:
        points: float [..., 2], x (column) and y (row) in half frames; (0, 0) is the centre.
        side: tokens on a side, 2 or more.

    Returns:
        [..., side * side], from 1 to 4, row by row; differentiable in the points.
    """
    axis = torch.linspace(-1, 1, side, device=points.device, dtype=points.dtype)
    beyond = ((axis - points[..., None]).abs() - PLATEAU).clamp(min=0)  # [..., 2, side]
    height = 1 + (1 - SLOPE * beyond).clamp(min=0)
    column, row = height.unbind(-2)
    return (row[..., :, None] * column[..., None, :]).flatten(-2)


def average_blobs(points: Tensor, side: int, spread: float) -> Tensor:
    """The mean of the maps of the nine points around each: [..., 2] -> [..., side * side]."""
    return draw_blobs(jitter(points, spread), side).mean(dim=-2)


def merge_pairs(former: Tensor, latter: Tensor, last: Literal["former", "latter"]) -> Tensor:
    """What pairs of adjacent frames say of their frames, as one value a frame.

    The first frame is in one pair only, and gets what that says of its former frame. A frame in the middle is in
    two, and gets the mean. The last frame would get what the last pair says of its latter frame, and does so in the
    decoder (`latter`); in the mask the released code gives it what is said of the former frame (`former`).

    Args:
        former: [B, T - 1, ...], of the first frame of each pair; one pair or more.
        latter: alike, of the second.
        last: which of them the last frame takes.

    Returns:
        [B, T, ...].
    """
    end = former[:, -1:] if last == "former" else latter[:, -1:]
    return torch.cat([former[:, :1], (former[:, 1:] + latter[:, :-1]) / 2, end], dim=1)


def share_out(mixture: Tensor, sampling: Sampling) -> Tensor:
    """Each token's part in its frame, from the mixture of the temporal and the spatial score.

    Args:
        mixture: float [..., N], not negative; no sum is asked for.
        sampling: `as_released` takes a softmax over the mixture, though its parts are probabilities already;
            `log_probability` divides by the sum.

    Returns:
        [..., N], not negative, of sum 1 (of sum 0 where the whole mixture is 0 and `log_probability` divides).
    """
    if sampling == "as_released":
        return mixture.softmax(dim=-1)
    return mixture / mixture.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(mixture.dtype).tiny)


def perturb(probability: Tensor, noise: Tensor, sampling: Sampling) -> Tensor:
    """The score that is ranked: Gumbel noise on the tokens' parts or on their logarithms.

    With `log_probability` (our inference of what is meant) the highest k are k draws without replacement, each in
    proportion to the parts of the rest, as `torch.multinomial` draws. With `as_released` parts of about 1/196 meet
    noise of deviation 1.28, so that the mask is all but uniform whatever the network says: see `divergence`.

    Args:
        probability: float [..., N], from `share_out` with the same sampling.
        noise: float [..., N], uniform in [0, 1).
        sampling: as above.

    Returns:
        [..., N], finite.
    """
    info = torch.finfo(noise.dtype)
    # Neither end may become infinite, which a softmax cannot take; 1 itself is what rounding to fewer bits can give.
    gumbel = -torch.log(-torch.log(noise.clamp(info.tiny, 1 - info.eps / 2)))
    return (probability if sampling == "as_released" else _log(probability)) + gumbel


def straight_through(score: Tensor, noise: Tensor, ratio: float, temperature: float) -> Tensor:
    """The mask as numbers that carry a gradient: in value 1 where `spatiotemporal` hides a token, else 0.

    The gradient is that of a softmax over the frame's scores divided by the temperature. It is not that of the mask,
    which has none; the temperature shapes it and changes no mask.

    Args:
        score: float [B, T, N], from `perturb`.
        noise: float [B, T, N], as the strategy gets it.
        ratio: share of a frame's tokens to hide.
        temperature: above 0; 0.05 in the released code.

    Returns:
        [B, T, N], exactly 0 and 1.
    """
    kept = hide_highest(score.detach(), noise, ratio)
    hidden = to_boolean(kept, score.shape[1], score.shape[2]).to(score.dtype)
    soft = (score / temperature).softmax(dim=-1)
    # The difference first: it is exactly 0, while 1 - soft + soft may be off by a rounding.
    return hidden + (soft - soft.detach())


def divergence(probability: Tensor, sampling: Sampling) -> Tensor:
    """How far the mask is from a uniform one: KL(p || uniform) in nats, where p is the distribution of the token of a
    frame that is hidden first (the one of the highest score); the mean over clips and frames.

    The highest of scores plus Gumbel noise is token i with probability softmax(scores)_i. So p is the softmax of the
    parts for `as_released`, and the parts themselves for `log_probability`. Tokens hidden later are drawn alike from
    what is left, so 0 means a uniformly random mask, and log N one whose first token is certain. As p is known,
    nothing has to be counted: KL = log N + sum p log p.

    Args:
        probability: float [..., N], from `share_out` with the same sampling.
        sampling: as in `perturb`.

    Returns:
        A scalar of the same dtype, without gradient, in [0, log N] up to rounding.
    """
    parts = probability.detach()
    log_first = parts.log_softmax(dim=-1) if sampling == "as_released" else _log(parts)
    return math.log(parts.shape[-1]) + (log_first.exp() * log_first).sum(dim=-1).mean()


def _log(probability: Tensor) -> Tensor:
    """The logarithm, finite also of 0: that is a token which is hidden only after all others."""
    return torch.log(probability.clamp(min=torch.finfo(probability.dtype).tiny))
