"""Tube masking (VideoMAE, section 3.3): one random spatial mask, the same in every slot."""

import torch
from torch import Tensor

from stm.masking import Guides, hide_highest, register


@register("tube")
def tube(guides: Guides, ratio: float) -> Tensor:
    """In every slot, keep the tokens whose noise in the first slot is lowest: int64 [B, K]."""
    # All scores are equal, and the noise, which breaks ties, is the same in every slot, so every slot hides the same tokens.
    noise = guides["noise"][:, :1].expand_as(guides["noise"])
    return hide_highest(torch.zeros_like(noise), noise, ratio)
