"""Attention masking (UMT, "semantic masking"; STM for images): tokens are sampled in proportion to a teacher's attention.

In each frame UMT samples the visible tokens without replacement with `torch.multinomial`, each with a probability
proportional to the attention of the teacher's class token. `attention` does the same; `attention_hidden` samples the hidden
tokens instead, as STM's release does for images. Here the sample's own noise determines the outcome, with exactly the
distribution of `torch.multinomial`: a token of weight w gets an exponential key of rate w, and the tokens with the smallest
keys are sampled. Token i has the smallest key with probability w_i / sum w, and since exponential variables are memoryless,
the same holds for the next smallest among the remaining tokens, and so on.

UMT masks single frames; a slot here is a tubelet, and its attention is the mean over its frames (our inference). The
guide is computed in stm/models/teachers/frame_teacher.py.
"""

import torch
from torch import Tensor

from stm.masking import Guides, hide_highest, register


@register("attention", needs=("attention",))
def attention(guides: Guides, ratio: float) -> Tensor:
    """Keep tokens sampled in proportion to the attention: int64 [B, K]; for uniform attention, the same as `random`."""
    return hide_highest(exponential_keys(guides["attention"], guides["noise"]), guides["noise"], ratio)


@register("attention_hidden", needs=("attention",))
def attention_hidden(guides: Guides, ratio: float) -> Tensor:
    """Hide tokens sampled in proportion to the attention; returns the kept ones, int64 [B, K]."""
    return hide_highest(-exponential_keys(guides["attention"], guides["noise"]), guides["noise"], ratio)


def exponential_keys(weight: Tensor, noise: Tensor) -> Tensor:
    """Logarithms of exponential variables of rate `weight`; the k smallest are a sample without replacement.

    Args:
        weight: [..., N], need not sum to 1. If it is zero, negative or NaN, the key is inf, so that such tokens come
            last, ordered by the noise.
        noise: [..., N], uniform in [0, 1).

    Returns:
        [..., N], from -inf to inf.
    """
    # The logarithm preserves the order and does not overflow if the attention is close to zero.
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    key = torch.log(-torch.log1p(-noise)) - torch.log(weight)
    return torch.where(weight > 0, key, torch.inf)
