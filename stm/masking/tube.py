"""Tube masking (VideoMAE, section 3.3): one random spatial mask, the same in every slot."""

import torch
from torch import Tensor

from stm.masking import Guides, hide_highest, register


@register("tube")
def tube(guides: Guides, ratio: float) -> Tensor:
    """Keep the tokens with the lowest noise of the first slot, in every slot: int64 [B, K]."""
    # With the same noise in every slot, breaking the ties of equal scores hides the same tokens in all.
    noise = guides["noise"][:, :1].expand_as(guides["noise"])
    return hide_highest(torch.zeros_like(noise), noise, ratio)
