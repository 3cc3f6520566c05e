"""Masked relevance modelling (ClusterSTM): predicts the relevance of each hidden token to the text.

The target is the relevance to the text of the hidden token, pooled with its neighbours by the teacher; the prediction is that
of the student decoder's token at the same position. The full paper is not available: its abstract and a note on it mention
only the relevance to the text and the L2 distance. Our inference [INF]: cosine similarities as the relevance and their scale
(`Scale`), each clip's own text (the paper mentions matrices, which could also mean all texts of the batch: `all_texts`), and
a mean over masked tokens only.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

Scaling = Literal["cosine", "logit_scale", "frame", "texts"]
FLOOR = 1e-3  # added in quadrature to a deviation: where all cosines are equal, the relevance is 0


class Scale(NamedTuple):
    """How cosine similarities become relevances; the same for target and prediction."""

    scaling: Scaling = "cosine"  # see `stm.config.Cluster.scaling`
    logit_scale: float = 1.0  # for `logit_scale`: the teacher's, by which its training multiplied cosines
    frames: Tensor | None = None  # for `frame`: [B, K, T], 1 in the frame of each token, else 0


COSINE = Scale()


def relevance(tokens: Tensor, text: Tensor, all_texts: bool = False, scale: Scale = COSINE) -> Tensor:
    """Relevance of tokens to texts [INF].

    Computed in float32 or wider, even under autocast. A zero text vector (a clip without a caption) has cosine 0 with all
    tokens, and is left out of the statistics over texts.

    Args:
        tokens: [B, K, C], not normalised.
        text: [B, C], not normalised; row i belongs to clip i.
        all_texts: compare with all texts of this process's batch instead of only the clip's own.
        scale: how the cosines are scaled.

    Returns:
        [B, K] for the clip's own text, [B, K, B] with `all_texts`. Cosines are in [-1, 1]; for `frame` and `texts`, values have
        mean 0 and deviation 1.

    Raises:
        ValueError: the shapes do not match.
    """
    if tokens.dim() != 3 or text.shape != (tokens.shape[0], tokens.shape[2]):
        raise ValueError(f"tokens {tuple(tokens.shape)} and text {tuple(text.shape)} must be [B, K, C] and [B, C]")
    with torch.autocast(tokens.device.type, enabled=False):
        dtype = torch.promote_types(torch.promote_types(tokens.dtype, text.dtype), torch.float32)
        tokens, text = normalize(tokens.to(dtype), dim=-1), normalize(text.to(dtype), dim=-1)
        if scale.scaling == "texts":
            known = text.ne(0).any(dim=-1).to(dtype)[None, :, None].expand(len(text), -1, -1)
            values = _standardise((tokens @ text.T).mT, known).mT
            return values if all_texts else values.diagonal(dim1=0, dim2=2).T
        values = tokens @ text.T if all_texts else tokens @ text[:, :, None]
        if scale.scaling == "logit_scale":
            values = scale.logit_scale * values
        elif scale.scaling == "frame":
            if scale.frames is None:
                raise ValueError("the scaling `frame` needs the frame of each token")
            values = _standardise(values, scale.frames.to(dtype))
        return values if all_texts else values[..., 0]


def relevance_loss(
    student: Tensor, target: Tensor, text: Tensor, all_texts: bool = False, scale: Scale = COSINE
) -> Tensor:
    """Mean squared difference between the student's and the teacher's relevance.

    Args:
        student: [B, M, C], the decoder's outputs for the M masked tokens [INF: only these], in the teacher's joint space.
        target: `relevance` of the teacher's tokens at the same positions, [B, M], or [B, M, B] with `all_texts`.
        text: [B, C], the teacher's caption embeddings.
        all_texts, scale: as for the target, see `relevance`.

    Returns:
        Scalar, float32 or wider; in [0, 4] for cosines, times the square of the logit scale for `logit_scale`.

    Raises:
        ValueError: the shapes do not match.
    """
    predicted = relevance(student, text, all_texts, scale)
    if predicted.shape != target.shape:
        raise ValueError(f"relevance {tuple(predicted.shape)} and target {tuple(target.shape)} differ in shape")
    return (predicted - target).square().mean()


def _standardise(values: Tensor, members: Tensor) -> Tensor:
    """Mean 0 and deviation 1 over the members of each group: values [B, K, M], members [B, K, groups] of 0 and 1."""
    shares = members / members.sum(dim=1, keepdim=True).clamp(min=1)
    centred = values - members @ (shares.mT @ values)
    variance = members @ (shares.mT @ centred.square())
    return centred / (variance + FLOOR**2).sqrt()
