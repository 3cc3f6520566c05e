"""Alignment with a frozen teacher's features (UMT, "unmasked token alignment"; STM)."""

import torch
from torch import Tensor
from torch.nn.functional import normalize


def alignment_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean of 2 - 2 cos over layers, clips and tokens: the squared distance between unit vectors, UMT's `l2`.

    UMT compares the visible tokens, STM all tokens. Computed in float32 or wider, even under autocast. The distance between
    a zero vector and any unit vector is 1.

    Args:
        student: [layers, B, K, C], not normalised.
        teacher: [layers, B, K, C], for the same layers and tokens, not normalised.

    Returns:
        Scalar in [0, 4].

    Raises:
        ValueError: the shapes differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} differ in shape")
    with torch.autocast(student.device.type, enabled=False):
        dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
        # Unlike 2 - 2 cos, squared differences cannot become negative by rounding.
        difference = normalize(student.to(dtype), dim=-1) - normalize(teacher.to(dtype), dim=-1)
        return difference.square().sum(dim=-1).mean()
