"""Video-text contrastive losses: InfoNCE over the clips and captions of all processes.

`match_pairs` is TGM's loss (section 3.4): row i of one side belongs to row i of the other. `contrast_ids` is UMT's (VTC):
all rows with an id in common (of a clip, or of a caption that clips share) are positives for one another.

In TGM's loss, two clips with the same caption are negatives for each other, as in the paper. The effect is small: identical
texts have equal logits, so each of m copies gets at most 1/m of the probability, the loss is bounded below by log(m), and
its gradient vanishes when the copies have all the probability. Only different texts for the same content are wrongly
pushed apart, such as two captions of a clip that occurs twice in the batch (`repeats`).
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from stm.distributed.gather import count_processes, gather, own_rank
from stm.objectives.positives import find_positives


class Match(NamedTuple):
    """Loss and in-batch retrieval accuracy; their means over processes equal those of the concatenated batch."""

    loss: Tensor  # scalar
    accuracy: Tensor  # scalar, fraction of clips whose most similar caption is their own


def match_pairs(video: Tensor, text: Tensor, temperature: float | Tensor, present: Tensor | None = None) -> Match:
    """Symmetric InfoNCE: the mean of the clip-to-caption and caption-to-clip cross entropies.

    Computed in float32 or wider, even under autocast: at temperature 0.01, logits reach 100, where bfloat16 has a resolution
    of 0.5. With several processes, all negatives are gathered, and gradients are returned to the process they came from.
    Each process compares its own rows with all columns, so that the work is distributed.

    Args:
        video: unit vectors [B, D]; B is the same on all processes.
        text: unit vectors [B, D]; row i belongs to row i of `video`.
        temperature: positive; may be a learned scalar tensor.
        present: bool [B], False for pairs to exclude (clips without a caption). None: all pairs count.

    Returns:
        Scalar loss and accuracy, both 0 if no pair counts.

    Raises:
        ValueError: the shapes differ.
    """
    if video.shape != text.shape or video.dim() != 2:
        raise ValueError(f"video {tuple(video.shape)} and text {tuple(text.shape)} must both be [B, D]")
    with torch.autocast(video.device.type, enabled=False):
        dtype = torch.promote_types(video.dtype, torch.float32)
        video, text = video.to(dtype), text.to(dtype)
        if present is None:
            present = torch.ones(len(video), dtype=torch.bool, device=video.device)
        # One collective instead of three: at these sizes, latency dominates.
        joined = gather(torch.cat([video, text, present[:, None].to(dtype)], dim=1))
        all_video, all_text, all_present = joined.split([video.shape[1], video.shape[1], 1], dim=1)
        absent = all_present.detach().T == 0  # [1, all]
        to_text = _logits(video, all_text, temperature, absent)
        to_video = _logits(text, all_video, temperature, absent)
        target = torch.arange(len(video), device=video.device) + own_rank() * len(video)
        loss = (
            cross_entropy(to_text, target, reduction="none") + cross_entropy(to_video, target, reduction="none")
        ) / 2
        # DDP averages gradients over the processes. The factor makes that average the mean over all pairs that count,
        # even if their number differs between processes.
        share = count_processes() / (~absent).sum().clamp(min=1).to(dtype)
        correct = (to_text.detach().argmax(dim=1) == target).to(dtype)
        return Match(*(torch.where(present, value, 0).sum() * share for value in (loss, correct)))


def _logits(rows: Tensor, columns: Tensor, temperature: float | Tensor, absent: Tensor) -> Tensor:
    """Scaled similarities [B, all]. Absent columns get the lowest finite value: with minus infinity, a row without present
    columns would become NaN."""
    logits = rows @ columns.T / temperature
    return logits.masked_fill(absent, torch.finfo(logits.dtype).min)


def contrast_ids(video: Tensor, text: Tensor, ids: Tensor, temperature: float | Tensor, divisor: float = 1.0) -> Tensor:
    """Symmetric contrastive loss in which all rows with an id in common are positives (UMT's VTC).

    A row's target is distributed equally over its positives. Without repeated ids, this equals the loss of `match_pairs`.
    The negatives of all processes are gathered; each process compares its own rows with all columns, and gradients are
    returned to the process they came from.

    UMT's released code computes the joined loss in each of W processes and returns to each only its own rows' gradient,
    without the other processes' parts. DDP then averages, so that all weights below the embeddings get 1 / W of the joined
    batch's gradient, and the temperature, which is not gathered, all of it. `divisor` W has the same gradient with any
    number of processes.

    Args:
        video: unit vectors [B, E]; B is the same on all processes.
        text: unit vectors [B, E]; row i belongs to row i of `video`.
        ids: int64 [B] or [B, I], sample ids, see `find_positives`.
        temperature: positive; may be a learned scalar tensor.
        divisor: the gradient of `video` and `text` is divided by it; the value of the loss is the same.

    Returns:
        Scalar, float32 or wider even under autocast: the mean of the clip-to-caption and caption-to-clip cross entropies.
        Its mean over processes equals the loss of the concatenated batch.

    Raises:
        ValueError: the shapes differ.
    """
    if video.shape != text.shape or video.dim() != 2 or ids.shape[:1] != video.shape[:1] or ids.dim() > 2:
        shapes = [tuple(x.shape) for x in (video, text, ids)]
        raise ValueError(
            f"video {shapes[0]} and text {shapes[1]} must both be [B, E], and ids {shapes[2]} be [B] or [B, I]"
        )
    with torch.autocast(video.device.type, enabled=False):
        dtype = torch.promote_types(video.dtype, torch.float32)
        pairs = torch.cat([video, text], dim=1).to(dtype)
        if divisor != 1:
            # The difference is 0, so that the value is exactly the same.
            pairs = pairs.detach() + (pairs - pairs.detach()) / divisor
        video, text = pairs.chunk(2, dim=1)
        all_video, all_text = gather(pairs).chunk(2, dim=1)
        # In a separate collective, because float32 cannot represent all ids above 2^24.
        positive = find_positives(ids, gather(ids)).to(dtype)  # [B, all]
        target = positive / positive.sum(dim=1, keepdim=True)
        to_text = cross_entropy(video @ all_text.T / temperature, target)
        to_video = cross_entropy(text @ all_video.T / temperature, target)
        return (to_text + to_video) / 2
