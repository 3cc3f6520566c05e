"""Attention masking (UMT, "semantic masking"): what a teacher looks at stays visible, by chance.

In each frame UMT draws the visible tokens without replacement, each with a probability in proportion to the
teacher's attention from its class token, by `torch.multinomial`. Here the sample's own noise draws them, with
exactly that distribution: a token of weight w gets an alarm clock that rings after an exponential time of
rate w. The first to ring is then token i with probability w_i / sum w, and, since exponential times have no
memory, the next is again in proportion among the rest, and so on.

UMT masks single frames; a slot here is a tubelet, and its attention is the mean of its frames' (our
inference). The guide comes from stm/models/teachers/attention_teacher.py.
"""

import torch
from torch import Tensor

from stm.masking import Guides, hide_highest, register


@register("attention", needs=("attention",))
def attention(guides: Guides, ratio: float) -> Tensor:
    """Kept tokens, int64 [B, K]; with equal attention everywhere the same as `random`."""
    return hide_highest(ring_times(guides["attention"], guides["noise"]), guides["noise"], ratio)


def ring_times(weight: Tensor, noise: Tensor) -> Tensor:
    """Logarithm of an exponential time of rate `weight`.

    Args:
        weight: [..., N], need not sum to 1. What is no positive number (zero, negative, NaN) never rings, so
            such tokens are hidden before any other; among themselves the noise decides.
        noise: [..., N], uniform in [0, 1).

    Returns:
        [..., N], from -inf (at once) to inf (never).
    """
    # The logarithm keeps the order and does not overflow where attention is near nothing.
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    time = torch.log(-torch.log1p(-noise)) - torch.log(weight)
    return torch.where(weight > 0, time, torch.inf)


@register("attention_hidden", needs=("attention",))
def attention_hidden(guides: Guides, ratio: float) -> Tensor:
    """Kept tokens, int64 [B, K]: hidden ones are drawn without replacement in proportion to the teacher's attention."""
    return hide_highest(-ring_times(guides["attention"], guides["noise"]), guides["noise"], ratio)
