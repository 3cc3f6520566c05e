"""Random masking: each slot hides its own uniformly drawn tokens, the same number in each."""

import torch
from torch import Tensor

from stm.masking import Guides, hide_highest, register


@register("random")
def random(guides: Guides, ratio: float) -> Tensor:
    """Kept tokens, int64 [B, K]; every subset of a slot is equally likely, and slots are independent."""
    noise = guides["noise"]
    return hide_highest(torch.zeros_like(noise), noise, ratio)
