"""Alignment with a frozen teacher's features (UMT, "unmasked token alignment"; STM)."""

import torch
from torch import Tensor
from torch.nn.functional import normalize


def alignment_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean of 2 - 2 cos over layers, clips and tokens: the squared distance of the unit vectors, UMT's `l2`.

    UMT compares the visible tokens, STM all. Computed in float32 at least, also under autocast. A vector of zeros has
    the distance 1 from all others.

    Args:
        student: [layers, B, K, C], any length of vectors.
        teacher: [layers, B, K, C], the same layers and tokens; any length of vectors.

    Returns:
        Scalar in [0, 4].

    Raises:
        ValueError: the shapes differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} differ in shape")
    with torch.autocast(student.device.type, enabled=False):
        dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
        # As a difference, it cannot fall below 0 by rounding, as 2 - 2 cos does for equal vectors.
        difference = normalize(student.to(dtype), dim=-1) - normalize(teacher.to(dtype), dim=-1)
        return difference.square().sum(dim=-1).mean()
