"""Random masking (MAE): each slot hides tokens sampled uniformly and independently, the same number in each."""

import torch
from torch import Tensor

from stm.masking import Guides, hide_highest, register


@register("random")
def random(guides: Guides, ratio: float) -> Tensor:
    """Keep a uniformly random subset of each slot: int64 [B, K]; slots are independent."""
    noise = guides["noise"]
    # Equal scores everywhere: the noise, which breaks ties, decides alone.
    return hide_highest(torch.zeros_like(noise), noise, ratio)
