"""UMT's objectives of clips and captions (second stage): contrast, matching with hard negatives, hidden words.

Several processes learn what one would from their joined batch (see stm/distributed/gather.py), with one exception that is
UMT's: hard negatives come from a process's own batch, as their tokens would have to be exchanged.
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from stm.distributed.gather import count_processes, gather

IGNORED = -100  # target of a word that is not to be predicted
_LEAST = 1e-4  # added to each negative's probability


def contrast_ids(video: Tensor, text: Tensor, ids: Tensor, temperature: float | Tensor) -> Tensor:
    """Symmetric contrast in which all rows of the same sample are each other's positives (UMT's VTC).

    A row's target is shared equally among its positives. Without repeated ids it is the loss of
    `stm.objectives.contrast.match_pairs`. All negatives of all processes are gathered; each process compares its own
    rows with all columns, and the gradient reaches the others' on the process that they came from.

    Args:
        video: unit vectors [B, E]; B is the same on all processes.
        text: unit vectors [B, E]; row i belongs to row i of `video`.
        ids: int64 [B], the number of each sample; the same one for its other views or captions.
        temperature: above 0; a scalar tensor may learn.

    Returns:
        Scalar, float32 at least, also under autocast: half the sum of the cross entropies of finding captions and of
        finding clips. Its mean over the processes is that of the joined batch.

    Raises:
        ValueError: the shapes differ.
    """
    if video.shape != text.shape or video.dim() != 2 or ids.shape != video.shape[:1]:
        shapes = [tuple(x.shape) for x in (video, text, ids)]
        raise ValueError(f"video {shapes[0]} and text {shapes[1]} must be [B, E] alike, and ids {shapes[2]} be [B]")
    with torch.autocast(video.device.type, enabled=False):
        dtype = torch.promote_types(video.dtype, torch.float32)
        video, text = video.to(dtype), text.to(dtype)
        all_video, all_text = gather(torch.cat([video, text], dim=1)).chunk(2, dim=1)
        # In a message of their own: as float32 numbers, large ids would run into each other.
        positive = (ids[:, None] == gather(ids)).to(dtype)  # [B, all]
        target = positive / positive.sum(dim=1, keepdim=True)
        to_text = cross_entropy(video @ all_text.T / temperature, target)
        to_video = cross_entropy(text @ all_video.T / temperature, target)
        return (to_text + to_video) / 2


@torch.no_grad()
def draw_negatives(
    similarity: Tensor, ids: Tensor, temperature: float | Tensor = 1.0, noise: Tensor | None = None
) -> Tensor:
    """One hard negative for each row: a column of another sample, the more probable the more similar (UMT's VTM).

    The probability is in proportion to softmax(similarity / temperature) + 1e-4. UMT adds the 1e-4 inside the softmax,
    where it changes nothing; outside it keeps a row drawable whose negatives have all rounded to 0 [INF]. The noise
    draws by exponential times: a column of weight w rings after a time of rate w, and the first to ring is drawn, which
    is column i with probability w_i / sum w.

    Args:
        similarity: float [B, B], of clips (rows) and captions for a wrong caption of each clip, or its transpose for a
            wrong clip of each caption. A row with NaN or infinity in it draws evenly from its negatives.
        ids: int64 [B], the number of each sample; columns with a row's own are never drawn.
        temperature: 1 where the similarity is divided by it already.
        noise: uniform in [0, 1), [B, B]; None: torch's own generator draws it.

    Returns:
        int64 [B]. A row without any negative gets another row of its own sample, or itself where it is alone: its
        label will be wrong, but nothing fails, where UMT's draw does.
    """
    dtype = torch.promote_types(similarity.dtype, torch.float32)
    positive = ids[:, None] == ids
    weight = (similarity.to(dtype) / temperature).softmax(dim=1) + _LEAST
    weight = weight.nan_to_num(nan=1e-2).masked_fill(positive, 0)
    others = ~torch.eye(len(ids), dtype=torch.bool, device=ids.device)
    weight = torch.where(positive.all(dim=1, keepdim=True), others.to(dtype), weight)
    noise = torch.rand_like(weight) if noise is None else noise.to(dtype)
    time = torch.log(-torch.log1p(-noise)) - torch.log(weight)
    return torch.where(weight > 0, time, torch.inf).argmin(dim=1)


def matching_loss(logits: Tensor) -> Tensor:
    """Cross entropy of whether pairs match (UMT's VTM).

    Args:
        logits: [3B, 2] of no and yes: B pairs that match, then B of a wrong clip with a caption, then B of a clip with
            a wrong caption.

    Returns:
        Scalar, float32 at least: the mean over all pairs, of which two thirds do not match.

    Raises:
        ValueError: another shape.
    """
    if logits.dim() != 2 or logits.shape[1] != 2 or logits.shape[0] % 3:
        raise ValueError(f"logits {tuple(logits.shape)} must be [3B, 2]")
    with torch.autocast(logits.device.type, enabled=False):
        pairs = len(logits)
        target = (torch.arange(pairs, device=logits.device) < pairs // 3).long()
        return cross_entropy(_widen(logits), target)


def mask_words(
    tokens: Tensor,
    probability: float,
    mask_id: int,
    special: tuple[int, ...],
    vocabulary: int,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Hides words for masked language modelling: BERT's 80 / 10 / 10, at UMT's higher rate.

    Of the words that are chosen, 80 % become [MASK], 10 % any word of the vocabulary, 10 % stay.

    Args:
        tokens: int64 [B, X].
        probability: of being chosen, of each word by itself; UMT: 0.5.
        mask_id: the token [MASK].
        special: tokens that are never chosen. UMT: [PAD] and [CLS]; [SEP] may be, and may be predicted.
        vocabulary: number of tokens; a random word is any of them, special ones included, as in UMT.
        noise: uniform in [0, 1), [3, B, X]: which are chosen, what becomes of them, which word. None: torch's own
            generator draws it.

    Returns:
        The tokens to read, int64 [B, X], and those to predict, int64 [B, X], -100 where none is.
    """
    if noise is None:
        noise = torch.rand(3, *tokens.shape, device=tokens.device)
    choice, fate, word = noise
    chosen = choice < probability
    for token in special:
        chosen = chosen & (tokens != token)
    # A product may be rounded up to the vocabulary's size, which is no word.
    words = (word * vocabulary).long().clamp(max=vocabulary - 1)
    read = torch.where(fate < 0.8, mask_id, torch.where(fate < 0.9, words, tokens))
    return torch.where(chosen, read, tokens), torch.where(chosen, tokens, IGNORED)


def masked_language_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of the hidden words (MLM).

    Args:
        logits: [B, X, V].
        targets: int64 [B, X] of `mask_words`.

    Returns:
        Scalar, float32 at least: the mean over hidden words; 0 where there are none. With several processes, its mean
        over them is that of the joined batch. (UMT takes each process's own mean, in which a word counts the more the
        fewer are hidden beside it.)
    """
    with torch.autocast(logits.device.type, enabled=False):
        total = cross_entropy(_widen(logits).flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
        hidden = gather((targets != IGNORED).sum()[None]).sum()
        return total * count_processes() / hidden.clamp(min=1)


def _widen(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
