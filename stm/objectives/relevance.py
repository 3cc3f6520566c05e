"""Masked relevance modelling (ClusterSTM): predicts how relevant each hidden token is to the text.

The target is the cosine of the text with the hidden token, pooled with its neighbours by the teacher; the prediction is the
cosine of the text with the student decoder's token for the same place. The paper's text is not available: its
abstract and a note on it give the relevance to the text and the L2 distance. Our inference [INF]: cosines without the
teacher's logit scale, each clip's own text (the paper speaks of matrices, which may as well be all texts of the batch:
`all_texts`), a mean over the masked tokens alone.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize


def relevance(tokens: Tensor, text: Tensor, all_texts: bool = False) -> Tensor:
    """Cosines of tokens with texts [INF].

    Computed in float32 at least, also under autocast. A text of zeros (a clip without a caption) has cosine 0 with all.

    Args:
        tokens: [B, K, C], not normalised.
        text: [B, C], not normalised; row i belongs to clip i.
        all_texts: with all texts of this process's batch instead of the clip's own.

    Returns:
        [B, K] with the own text, [B, K, B] with all, in [-1, 1].

    Raises:
        ValueError: the shapes do not match.
    """
    if tokens.dim() != 3 or text.shape != (tokens.shape[0], tokens.shape[2]):
        raise ValueError(f"tokens {tuple(tokens.shape)} and text {tuple(text.shape)} must be [B, K, C] and [B, C]")
    with torch.autocast(tokens.device.type, enabled=False):
        dtype = torch.promote_types(torch.promote_types(tokens.dtype, text.dtype), torch.float32)
        tokens, text = normalize(tokens.to(dtype), dim=-1), normalize(text.to(dtype), dim=-1)
        return tokens @ text.T if all_texts else (tokens @ text[:, :, None])[..., 0]


def relevance_loss(student: Tensor, target: Tensor, text: Tensor, all_texts: bool = False) -> Tensor:
    """Mean squared difference of the student's and the teacher's relevance.

    Args:
        student: [B, M, C], the decoder's tokens for the M masked ones [INF: these alone], in the teacher's joint space.
        target: `relevance` of the teacher's tokens at the same places, [B, M], or [B, M, B] with `all_texts`.
        text: [B, C], the teacher's vectors of the captions.
        all_texts: see `relevance`.

    Returns:
        Scalar in [0, 4], in float32 at least.

    Raises:
        ValueError: the shapes do not match.
    """
    predicted = relevance(student, text, all_texts)
    if predicted.shape != target.shape:
        raise ValueError(f"relevance {tuple(predicted.shape)} and target {tuple(target.shape)} differ in shape")
    return (predicted - target).square().mean()
