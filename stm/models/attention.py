"""Attention weights of an encoder's last block, for figures (TGM, Figure 5).

Fused attention, which training uses, never materialises these weights. They are recomputed here from the input of the
last block's attention.
"""

import torch
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from stm.models.vit import Architecture, VideoEncoder


def centre_token(architecture: Architecture) -> int:
    """Token index of the centre patch in the middle time slot; for an even count, the one after the middle."""
    side = architecture.image_size // architecture.patch_size
    return architecture.slots // 2 * architecture.slot_tokens + side // 2 * side + side // 2


@torch.no_grad()
def attention_from(
    encoder: VideoEncoder, video: Tensor, token: int | None = None, kept: Tensor | None = None
) -> Tensor:
    """The last block's attention from one token to all tokens, averaged over heads.

    Args:
        encoder: runs in its current mode: eval, unless stochastic depth should be included.
        video: uint8, or float in [0, 1], [B, T, 3, S, S].
        token: index of the query token; None: the centre patch of the middle slot.
        kept: int64 [B, K], the tokens that the encoder sees, which must include `token` in every clip; None: all.

    Returns:
        float32 [B, L]; sums to 1 in each clip, and is 0 for tokens that the encoder does not see.

    Raises:
        ValueError: the token is out of range, or masked in a clip.
    """
    tokens = encoder.architecture.tokens
    query = centre_token(encoder.architecture) if token is None else token
    if not 0 <= query < tokens:
        raise ValueError(f"token {query} is out of range; there are 0 to {tokens - 1}")
    visible = torch.arange(tokens, device=video.device).expand(len(video), -1) if kept is None else kept
    is_query = visible == query  # [B, K]
    if not bool(is_query.any(dim=1).all()):
        raise ValueError(f"token {query} is masked in a clip of the batch; take a kept one, or keep all (kept=None)")
    # A token's index among the visible tokens differs from clip to clip.
    weights = _last_weights(encoder, video, kept, is_query.long().argmax(dim=1))
    return torch.zeros(len(video), tokens, device=video.device).scatter(1, visible, weights)


def _last_weights(encoder: VideoEncoder, video: Tensor, kept: Tensor | None, place: Tensor) -> Tensor:
    """Attention weights of the tokens at indices `place` [B] among the visible tokens, float32 [B, K]."""
    last = encoder.blocks[-1].attn
    assert isinstance(last, Attention)
    inputs: list[Tensor] = []

    def record(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        inputs.append(arguments[0])

    # A hook, so that the encoder need not return its blocks' inputs in training.
    handle = last.register_forward_pre_hook(record)
    try:
        encoder(video, kept)
    finally:
        handle.remove()
    parts = last.qkv(inputs[0]).unflatten(2, (3, last.num_heads, -1))  # [B, K, 3, heads, values]
    query, key = last.q_norm(parts[:, :, 0]).float(), last.k_norm(parts[:, :, 1]).float()
    query = query[torch.arange(len(query), device=query.device), place]  # [B, heads, values]
    logits = torch.einsum("bhd,bkhd->bhk", query * last.scale, key)
    return logits.softmax(dim=2).mean(dim=1)
