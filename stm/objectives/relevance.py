"""Masked relevance modelling (ClusterSTM): predicts the relevance of each hidden token to the text.

The target is the cosine similarity between the text and the hidden token, pooled with its neighbours by the teacher; the
prediction is the cosine similarity between the text and the student decoder's token at the same position. The full paper is
not available: its abstract and a note on it mention only the relevance to the text and the L2 distance. Our inference
[INF]: cosines without the teacher's logit scale, each clip's own text (the paper mentions matrices, which could also mean
all texts of the batch: `all_texts`), and a mean over masked tokens only.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize


def relevance(tokens: Tensor, text: Tensor, all_texts: bool = False) -> Tensor:
    """Cosine similarities between tokens and texts [INF].

    Computed in float32 or wider, even under autocast. A zero text vector (a clip without a caption) has cosine 0 with all
    tokens.

    Args:
        tokens: [B, K, C], not normalised.
        text: [B, C], not normalised; row i belongs to clip i.
        all_texts: compare with all texts of this process's batch instead of only the clip's own.

    Returns:
        [B, K] for the clip's own text, [B, K, B] with `all_texts`, in [-1, 1].

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
    """Mean squared difference between the student's and the teacher's relevance.

    Args:
        student: [B, M, C], the decoder's outputs for the M masked tokens [INF: only these], in the teacher's joint space.
        target: `relevance` of the teacher's tokens at the same positions, [B, M], or [B, M, B] with `all_texts`.
        text: [B, C], the teacher's caption embeddings.
        all_texts: see `relevance`.

    Returns:
        Scalar in [0, 4], float32 or wider.

    Raises:
        ValueError: the shapes do not match.
    """
    predicted = relevance(student, text, all_texts)
    if predicted.shape != target.shape:
        raise ValueError(f"relevance {tuple(predicted.shape)} and target {tuple(target.shape)} differ in shape")
    return (predicted - target).square().mean()
