"""Masked language modelling conditioned on the video (UMT, second stage: MLM)."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from stm.distributed.gather import count_processes, gather

WordAverage = Literal["batch", "group"]

IGNORED = -100  # target of words that are not predicted


def mask_words(
    tokens: Tensor,
    probability: float,
    mask_id: int,
    special: tuple[int, ...],
    vocabulary: int,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Hides words for masked language modelling: BERT's 80 / 10 / 10, at UMT's higher rate.

    80 % of the chosen words are replaced by [MASK], 10 % by a random word of the vocabulary, and 10 % are left unchanged.

    Args:
        tokens: int64 [B, X].
        probability: probability of choosing each word, independently; UMT: 0.5.
        mask_id: the id of [MASK].
        special: ids that are never chosen. UMT: [PAD] and [CLS]; [SEP] can be chosen and is then predicted.
        vocabulary: vocabulary size; random words are drawn from all of it, including special tokens, as in UMT.
        noise: uniform in [0, 1), [3, B, X]: for the choice of words, their replacement type, and the random words. None: from
            torch's global generator.

    Returns:
        The input tokens, int64 [B, X], and the targets, int64 [B, X], -100 for words that are not predicted.
    """
    if noise is None:
        noise = torch.rand(3, *tokens.shape, device=tokens.device)
    choice, outcome, word = noise
    chosen = choice < probability
    for token in special:
        chosen = chosen & (tokens != token)
    # Rounding may yield the vocabulary size itself, which is out of range.
    words = (word * vocabulary).long().clamp(max=vocabulary - 1)
    replaced = torch.where(outcome < 0.8, mask_id, torch.where(outcome < 0.9, words, tokens))
    return torch.where(chosen, replaced, tokens), torch.where(chosen, tokens, IGNORED)


def masked_language_loss(
    logits: Tensor, targets: Tensor, average: WordAverage = "batch", among: int | None = None
) -> Tensor:
    """Cross entropy of the hidden words (MLM).

    Args:
        logits: [B, X, V].
        targets: int64 [B, X], from `mask_words`.
        average: `batch`: the mean over the hidden words of all processes, so that the mean over processes equals the loss of
            the concatenated batch. `group`: the mean over groups of captions of the mean over a group's hidden words, as in
            UMT, where a word counts more on a GPU with fewer hidden words.
        among: captions per group, taken in order; None: all captions of the process are one group.

    Returns:
        Scalar, float32 or wider. A batch or group without hidden words counts as 0 (in UMT, as NaN).
    """
    with torch.autocast(logits.device.type, enabled=False):
        exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if average == "group":
            each = cross_entropy(exact.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
            size = among or len(targets)
            sums = each.view(targets.shape).sum(dim=1).split(size)
            counts = (targets != IGNORED).sum(dim=1).split(size)
            groups = zip(sums, counts, strict=True)
            return torch.stack([words.sum() / count.sum().clamp(min=1) for words, count in groups]).mean()
        total = cross_entropy(exact.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
        hidden = gather((targets != IGNORED).sum()[None]).sum()
        return total * count_processes() / hidden.clamp(min=1)
