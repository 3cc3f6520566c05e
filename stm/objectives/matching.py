"""Video-text matching with hard negatives (UMT, second stage: VTM).

Several processes compute what a single one would on their joined batch (see stm/distributed/gather.py), with one exception,
which is UMT's: hard negatives come from a process's own batch, since those of others would need their tokens exchanged.
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

_FLOOR = 1e-4  # added to each negative's probability


@torch.no_grad()
def sample_negatives(
    similarity: Tensor, ids: Tensor, temperature: float | Tensor = 1.0, noise: Tensor | None = None
) -> Tensor:
    """One hard negative per row: a column of another sample, the more similar the more probable (UMT's VTM).

    The probability is in proportion to softmax(similarity / temperature) + 1e-4. UMT adds the 1e-4 inside the softmax,
    where it changes nothing; outside, a row whose negatives have all rounded to 0 can still be sampled [INF]. The noise
    gives each column an exponentially distributed key of rate w, its weight, and the column with the smallest key is
    chosen: column i with probability w_i / sum w.

    Args:
        similarity: float [B, B], of clips (rows) and captions for a wrong caption of each clip, or its transpose for a
            wrong clip of each caption. A row with NaN or infinity samples uniformly from its negatives.
        ids: int64 [B], the number of each sample; columns with a row's own are never sampled.
        temperature: 1 where the similarity is divided by it already.
        noise: uniform in [0, 1), [B, B]; None: from torch's global generator.

    Returns:
        int64 [B]. A row without negatives gets another row of its own sample, or itself if it has no other: its label will
        be wrong, but nothing fails, where UMT's code does.
    """
    dtype = torch.promote_types(similarity.dtype, torch.float32)
    positive = ids[:, None] == ids
    weight = (similarity.to(dtype) / temperature).softmax(dim=1) + _FLOOR
    # Any constant will do: a row of NaN has it in all columns, which makes the choice uniform.
    weight = weight.nan_to_num(nan=1e-2).masked_fill(positive, 0)
    others = ~torch.eye(len(ids), dtype=torch.bool, device=ids.device)
    weight = torch.where(positive.all(dim=1, keepdim=True), others.to(dtype), weight)
    noise = torch.rand_like(weight) if noise is None else noise.to(dtype)
    keys = torch.log(-torch.log1p(-noise)) - torch.log(weight)  # logarithms of exponential variates of rate `weight`
    return torch.where(weight > 0, keys, torch.inf).argmin(dim=1)


def matching_loss(logits: Tensor) -> Tensor:
    """Cross entropy of whether pairs match (UMT's VTM).

    Args:
        logits: [3B, 2] for no and yes: B matching pairs, then B captions with a wrong clip, then B clips with a wrong
            caption.

    Returns:
        Scalar, float32 at least: the mean over all pairs, of which two thirds do not match.

    Raises:
        ValueError: another shape.
    """
    if logits.dim() != 2 or logits.shape[1] != 2 or logits.shape[0] % 3:
        raise ValueError(f"logits {tuple(logits.shape)} must be [3B, 2]")
    with torch.autocast(logits.device.type, enabled=False):
        pairs = len(logits)
        # Only the first third are true pairs.
        target = (torch.arange(pairs, device=logits.device) < pairs // 3).long()
        return cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), target)
