"""Masked language modelling conditioned on the video (UMT, second stage: MLM)."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from stm.distributed.gather import count_processes, gather

IGNORED = -100  # target of a word that is not predicted


def mask_words(
    tokens: Tensor,
    probability: float,
    mask_id: int,
    special: tuple[int, ...],
    vocabulary: int,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Hides words for masked language modelling: BERT's 80 / 10 / 10, at UMT's higher rate.

    Of the chosen words, 80 % become [MASK], 10 % a random word of the vocabulary, and 10 % stay.

    Args:
        tokens: int64 [B, X].
        probability: of each word to be chosen, independently; UMT: 0.5.
        mask_id: the token [MASK].
        special: tokens that are never chosen. UMT: [PAD] and [CLS]; [SEP] can be chosen, and is then predicted.
        vocabulary: number of tokens; a random word is any of them, special ones included, as in UMT.
        noise: uniform in [0, 1), [3, B, X]: for the choice, its outcome, and the random word. None: from torch's global
            generator.

    Returns:
        The input tokens, int64 [B, X], and the targets, int64 [B, X], -100 where there is none.
    """
    if noise is None:
        noise = torch.rand(3, *tokens.shape, device=tokens.device)
    choice, outcome, word = noise
    chosen = choice < probability
    for token in special:
        chosen = chosen & (tokens != token)
    # The product may be rounded up to the vocabulary's size, which is out of range.
    words = (word * vocabulary).long().clamp(max=vocabulary - 1)
    replaced = torch.where(outcome < 0.8, mask_id, torch.where(outcome < 0.9, words, tokens))
    return torch.where(chosen, replaced, tokens), torch.where(chosen, tokens, IGNORED)


def masked_language_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of the hidden words (MLM).

    Args:
        logits: [B, X, V].
        targets: int64 [B, X] of `mask_words`.

    Returns:
        Scalar, float32 at least: the mean over hidden words; 0 where there are none. With several processes, its mean
        over them is that of the joined batch. (UMT averages within each process, so that the fewer words a process hides,
        the more each counts.)
    """
    with torch.autocast(logits.device.type, enabled=False):
        exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
        total = cross_entropy(exact.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
        hidden = gather((targets != IGNORED).sum()[None]).sum()
        return total * count_processes() / hidden.clamp(min=1)
