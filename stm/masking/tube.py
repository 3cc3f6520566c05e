"""Tube masking (VideoMAE, section 3.3): one random spatial mask, the same in every slot."""

import torch
from torch import Tensor

from stm.masking import Guides, hide_highest, register


@register("tube")
def tube(guides: Guides, ratio: float) -> Tensor:
    """Kept tokens, int64 [B, K]; the first slot's noise decides for all slots."""
    noise = guides["noise"][:, :1].expand_as(guides["noise"])
    return hide_highest(torch.zeros_like(noise), noise, ratio)
