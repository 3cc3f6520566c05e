"""Video-text contrast (TGM, section 3.4): InfoNCE over the clips and captions of all processes.

Two clips whose captions have the same words are each other's negatives, as in the paper. That does less harm than
it seems: equal texts have equal logits, so of m copies each gets at most 1/m of the probability, the loss has the
floor log(m), and the gradient vanishes when a clip is as near to its text as all copies together can be. What does
push wrongly are different texts for the same content, such as two captions of one clip that is in the batch twice
(`repeats`).
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from stm.distributed.gather import count_processes, gather, own_rank


class Match(NamedTuple):
    """How well clips and captions find each other; the mean over the processes is that of the joined batch."""

    loss: Tensor  # scalar
    accuracy: Tensor  # scalar, share of clips whose most similar caption is their own


def info_nce(video: Tensor, text: Tensor, temperature: float | Tensor, present: Tensor | None = None) -> Tensor:
    """The symmetric InfoNCE loss; see `match_pairs`."""
    return match_pairs(video, text, temperature, present).loss


def match_pairs(video: Tensor, text: Tensor, temperature: float | Tensor, present: Tensor | None = None) -> Match:
    """Symmetric InfoNCE: the mean of the cross entropies of finding the caption of a clip and the clip of a caption.

    Computed in float32 at least, also under autocast: logits at temperature 0.01 reach 100, where bfloat16 has
    steps of a half. With several processes, all negatives are gathered, and the gradient reaches them on the
    process that they came from. Each process compares its own rows with all columns, so that the work is shared.

    Args:
        video: unit vectors [B, D]; B is the same on all processes.
        text: unit vectors [B, D]; row i belongs to row i of `video`.
        temperature: above 0; a scalar tensor may learn.
        present: bool [B], False for a pair that takes no part (a clip without a caption). None: all take part.

    Returns:
        Scalars. Both are 0 when no pair takes part.

    Raises:
        ValueError: the shapes differ.
    """
    if video.shape != text.shape or video.dim() != 2:
        raise ValueError(f"video {tuple(video.shape)} and text {tuple(text.shape)} must be [B, D] alike")
    with torch.autocast(video.device.type, enabled=False):
        dtype = torch.promote_types(video.dtype, torch.float32)
        video, text = video.to(dtype), text.to(dtype)
        if present is None:
            present = torch.ones(len(video), dtype=torch.bool, device=video.device)
        # One message between the processes, not three.
        joined = gather(torch.cat([video, text, present[:, None].to(dtype)], dim=1))
        all_video, all_text, all_present = joined.split([video.shape[1], video.shape[1], 1], dim=1)
        absent = all_present.detach().T == 0  # [1, all]
        to_text = _logits(video, all_text, temperature, absent)
        to_video = _logits(text, all_video, temperature, absent)
        target = torch.arange(len(video), device=video.device) + own_rank() * len(video)
        loss = (
            cross_entropy(to_text, target, reduction="none") + cross_entropy(to_video, target, reduction="none")
        ) / 2
        share = count_processes() / (~absent).sum().clamp(min=1).to(dtype)
        found = (to_text.detach().argmax(dim=1) == target).to(dtype)
        return Match(*(torch.where(present, value, 0).sum() * share for value in (loss, found)))


def _logits(rows: Tensor, columns: Tensor, temperature: float | Tensor, absent: Tensor) -> Tensor:
    """Similarities [B, all]. Absent columns get the least finite number: with minus infinity, a row of nothing
    else would become NaN."""
    logits = rows @ columns.T / temperature
    return logits.masked_fill(absent, torch.finfo(logits.dtype).min)
