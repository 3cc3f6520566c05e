"""Video-text matching with hard negatives (UMT, second stage: VTM).

With several processes, results equal those of a single process on the concatenated batch (see stm/distributed/gather.py),
with one exception, as in UMT: hard negatives are sampled within each process, to avoid exchanging tokens.
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from stm.objectives.positives import find_positives


@torch.no_grad()
def sample_negatives(
    similarity: Tensor,
    ids: Tensor,
    temperature: float | Tensor = 1.0,
    noise: Tensor | None = None,
    among: int | None = None,
) -> Tensor:
    """Sample a hard negative per row: a column without a common id, with more similar ones more likely (UMT's VTM).

    The probability is proportional to exp(similarity / temperature) over the row's negatives. UMT adds 1e-4 to the similarity,
    which no softmax sees; as a floor of the probabilities, it would outweigh what a trained model leaves to its negatives.
    Weights are logarithms here, so that none rounds to 0: where all of a row's do, UMT's code fails. The noise is converted
    to an exponentially distributed key per column, whose rate is the column's weight w. The column with the smallest key is
    chosen, which selects column i with probability w_i / sum w.

    Args:
        similarity: float [B, B], clips (rows) by captions to sample a wrong caption per clip, or the transpose to sample a
            wrong clip per caption. Rows with NaN or infinity among their negatives sample uniformly from them.
        ids: int64 [B] or [B, I], sample ids, see `find_positives`; positives are never sampled.
        temperature: 1 if the similarity is already divided by it.
        noise: uniform in [0, 1), [B, B]; None: from torch's global generator.
        among: rows are taken in groups of this size, in order, and negatives sampled within a group, as if each group were
            the batch of one process; None: one group. A row whose group has no negative gets one of another group.

    Returns:
        Column indices, int64 [B]. A row without negatives gets a different column of its own sample, or itself if there is
        none: its label will be wrong, but sampling does not fail, unlike in UMT's code.
    """
    dtype = torch.promote_types(similarity.dtype, torch.float32)
    similarity, excluded = similarity.to(dtype), find_positives(ids, ids)
    if among is not None:
        groups = torch.arange(len(ids), device=ids.device) // among
        outside = groups[:, None] != groups
        alone = (excluded | outside).all(dim=1, keepdim=True)
        excluded = torch.where(alone, excluded, excluded | outside)
    others = ~torch.eye(len(ids), dtype=torch.bool, device=ids.device)
    allowed = torch.where(excluded.all(dim=1, keepdim=True), others, ~excluded)
    log_weight = (similarity / temperature).masked_fill(~allowed, -torch.inf).log_softmax(dim=1)
    log_weight = torch.where(log_weight.isnan(), 0, log_weight)  # any constant makes the choice uniform
    noise = torch.rand_like(log_weight) if noise is None else noise.to(dtype)
    keys = torch.log(-torch.log1p(-noise)) - log_weight  # logarithms of exponential variates with these rates
    return torch.where(allowed & (log_weight > -torch.inf), keys, torch.inf).argmin(dim=1)


def matching_loss(logits: Tensor) -> Tensor:
    """Cross entropy of the match / no match classification of pairs (UMT's VTM).

    Args:
        logits: [3B, 2] (no, yes) for B matching pairs, then B captions with a wrong clip, then B clips with a wrong
            caption.

    Returns:
        Scalar, float32 or wider: the mean over all pairs, two thirds of which do not match.

    Raises:
        ValueError: the shape is different.
    """
    if logits.dim() != 2 or logits.shape[1] != 2 or logits.shape[0] % 3:
        raise ValueError(f"logits {tuple(logits.shape)} must be [3B, 2]")
    with torch.autocast(logits.device.type, enabled=False):
        pairs = len(logits)
        # Only the first third are matching pairs.
        target = (torch.arange(pairs, device=logits.device) < pairs // 3).long()
        return cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), target)
