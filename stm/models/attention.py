"""Where an encoder looks: attention of its last block, for pictures (TGM, Figure 5).

The fused attention of training never has these weights in memory. They are made here, anew, from what goes into
the last block's attention.
"""

import torch
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from stm.models.vit import Architecture, VideoEncoder


def centre_token(architecture: Architecture) -> int:
    """The number of the centre patch in the middle time slot: of even counts, the one after the middle."""
    side = architecture.image_size // architecture.patch_size
    return architecture.slots // 2 * architecture.slot_tokens + side // 2 * side + side // 2


@torch.no_grad()
def attention_from(
    encoder: VideoEncoder, video: Tensor, token: int | None = None, kept: Tensor | None = None
) -> Tensor:
    """How the last block's attention of one token is spread over all tokens, the mean of the heads.

    Args:
        encoder: in the mode in which it shall run (eval, unless stochastic depth is wanted).
        video: uint8, or float in [0, 1], [B, T, 3, S, S].
        token: the number of the token that asks; None: the centre patch of the middle slot.
        kept: int64 [B, K], the tokens that the encoder sees, among them `token` in every clip; None: all.

    Returns:
        float32 [B, L]; sums to 1 in each clip, and is 0 for tokens that the encoder does not see.

    Raises:
        ValueError: there is no such token, or a clip does not keep it.
    """
    tokens = encoder.architecture.tokens
    asked = centre_token(encoder.architecture) if token is None else token
    if not 0 <= asked < tokens:
        raise ValueError(f"no token {asked}; there are 0 to {tokens - 1}")
    seen = torch.arange(tokens, device=video.device).expand(len(video), -1) if kept is None else kept
    is_asked = seen == asked  # [B, K]
    if not bool(is_asked.any(dim=1).all()):
        raise ValueError(f"token {asked} is masked in a clip of the batch; ask a kept one, or give all (kept=None)")
    weights = _last_weights(encoder, video, kept, is_asked.long().argmax(dim=1))
    return torch.zeros(len(video), tokens, device=video.device).scatter(1, seen, weights)


def _last_weights(encoder: VideoEncoder, video: Tensor, kept: Tensor | None, place: Tensor) -> Tensor:
    """Attention weights of the tokens at `place` [B] among those that are seen, float32 [B, K]."""
    last = encoder.blocks[-1].attn
    assert isinstance(last, Attention)
    taken: list[Tensor] = []

    def take(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        taken.append(arguments[0])

    handle = last.register_forward_pre_hook(take)
    try:
        encoder(video, kept)
    finally:
        handle.remove()
    parts = last.qkv(taken[0]).unflatten(2, (3, last.num_heads, -1))  # [B, K, 3, heads, values]
    query, key = last.q_norm(parts[:, :, 0]).float(), last.k_norm(parts[:, :, 1]).float()
    query = query[torch.arange(len(query), device=query.device), place]  # [B, heads, values]
    logits = torch.einsum("bhd,bkhd->bhk", query * last.scale, key)
    return logits.softmax(dim=2).mean(dim=1)
