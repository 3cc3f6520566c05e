"""Random masking (MAE): each slot hides the same number of tokens, sampled uniformly and independently of other slots."""

import torch
from torch import Tensor

from stm.masking import Guides, hide_highest, register


@register("random")
def random(guides: Guides, ratio: float) -> Tensor:
    """Keep a uniformly random subset of each slot: int64 [B, K]; slots are independent."""
    noise = guides["noise"]
    # All scores are equal, so the noise, which breaks ties, determines the mask.
    return hide_highest(torch.zeros_like(noise), noise, ratio)
