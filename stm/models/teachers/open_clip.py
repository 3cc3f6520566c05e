"""open_clip's image towers as teachers: its own ViT with a class token (CLIP), and timm's with a pooling head (SigLIP)."""

from collections.abc import Sequence
from typing import Any

import torch
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from timm.layers import AttentionPoolLatent
from timm.models.vision_transformer import VisionTransformer as TimmTransformer
from torch import Tensor, nn

from stm.models.teachers.tower import (
    ClassTokenTower,
    LoadedTower,
    Part,
    ProbeTower,
    Tower,
    project_joint,
    resize_positions,
    split_heads,
)
from stm.pretrained.clip import load_clip
from stm.pretrained.hub import ModelError

ADVICE = "take a CLIP with a class token, ViT-B-16-quickgelu@openai for instance"


def load_open_clip(name: str) -> LoadedTower:
    """The image tower of the open_clip model that a config names, on the CPU, in float32.

    Raises:
        ModelError: it cannot be loaded, or is of neither family.
    """
    clip = load_clip(name, device="cpu", setting="teacher.model")
    return LoadedTower(make_tower(clip.model.visual), dict(clip.identity), clip.mean, clip.std)


def make_tower(model: nn.Module) -> Tower:
    """A tower around open_clip's `visual`, which it changes in place."""
    trunk = getattr(model, "trunk", None)
    if isinstance(trunk, TimmTransformer) and trunk.attn_pool is not None:
        return TimmProbeTower(model)
    return OpenClipTower(model)


class OpenClipTower(ClassTokenTower):
    """open_clip's own ViT, with or without the norm before its blocks, with any activation."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = _check_class_token(model)
        self.last: ResidualAttentionBlock = self.model.transformer.resblocks[-1]
        self.patch = self.model.patch_size[0]
        self.heads = self.last.attn.num_heads
        self.depth = len(self.model.transformer.resblocks)
        self.token_width = self.stem_width = self.convolution.out_channels
        self.feature_width = self.model.proj.shape[1]

    def resize(self, cells: int) -> None:
        model = self.model
        model.positional_embedding = resize_positions(model.positional_embedding, cells, 1, tuple(model.grid_size))
        model.grid_size = (cells, cells)
        model.image_size = tuple(cells * side for side in model.patch_size)

    @property
    def convolution(self) -> nn.Conv2d:
        return self.model.conv1

    def run_blocks(self, pixels: Tensor, numbers: Sequence[int]) -> list[Tensor]:
        found = self.model.forward_intermediates(
            self.cast(pixels),
            indices=list(numbers),
            stop_early=True,
            intermediates_only=True,
            output_fmt="NLC",
            output_extra_tokens=True,
        )
        pairs = zip(found["image_intermediates_prefix"], found["image_intermediates"], strict=True)
        return [torch.cat(pair, dim=1) for pair in pairs]

    def run_last(self, states: Tensor) -> Tensor:
        return self.last(states)

    def to_joint(self, tokens: Tensor) -> Tensor:
        return self.model.ln_post(tokens) @ self.model.proj

    def project(self, states: Tensor, part: Part) -> Tensor:
        return project_joint(self.last.attn, self.last.ln_1(states), part)

    def finish(self, states: Tensor, mixed: Tensor) -> Tensor:
        states = states + self.last.ls_1(self.last.attn.out_proj(mixed))
        return states + self.last.ls_2(self.last.mlp(self.last.ln_2(states)))


class TimmProbeTower(ProbeTower):
    """timm's ViT with an attention pooling head inside open_clip: SigLIP and SigLIP 2."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.trunk: Any
        self.trunk, self.head = _check_probe(model)
        self.patch = self.convolution.kernel_size[0]
        self.heads = self.head.num_heads
        self.depth = len(self.trunk.blocks)
        self.token_width = self.stem_width = self.feature_width = self.convolution.out_channels

    def resize(self, cells: int) -> None:
        self.trunk.set_input_size((cells * self.patch, cells * self.patch))

    @property
    def convolution(self) -> nn.Conv2d:
        return self.trunk.patch_embed.proj

    def run_blocks(self, pixels: Tensor, numbers: Sequence[int]) -> list[Tensor]:
        return self.trunk.forward_intermediates(
            self.cast(pixels), indices=list(numbers), stop_early=True, intermediates_only=True, output_fmt="NLC"
        )

    def to_joint(self, tokens: Tensor) -> Tensor:
        return self.trunk.norm(tokens)

    def project(self, states: Tensor, part: Part) -> Tensor:
        if part == "query":
            return self.head.q_norm(split_heads(self.head.q(states), self.heads))
        key, value = (split_heads(half, self.heads) for half in self.head.kv(states).chunk(2, dim=-1))
        return self.head.k_norm(key) if part == "key" else value

    @property
    def probe(self) -> Tensor:
        return self.head.latent

    def finish(self, mixed: Tensor) -> Tensor:
        pooled = self.head.proj(mixed)
        return pooled + self.head.mlp(self.head.norm(pooled))


def _check_class_token(model: nn.Module) -> VisionTransformer:
    """The model, if its last block's class token is what its embedding is read from.

    Raises:
        ModelError: it is another, or its last block has no plain attention; the message says what to take.
    """
    if not isinstance(model, VisionTransformer):
        raise ModelError(f"teacher.model has no open_clip ViT image tower but a {type(model).__name__}; {ADVICE}")
    if model.attn_pool is not None or model.pool_type != "tok":
        pooling = "an attention pooler" if model.attn_pool is not None else f"{model.pool_type!r} pooling"
        raise ModelError(
            f"teacher.model is read by {pooling}, not by a class token, which attends to nothing; {ADVICE}"
        )
    blocks = model.transformer.resblocks
    if len(blocks) < 2 or not isinstance(getattr(blocks[-1], "attn", None), nn.MultiheadAttention):
        raise ModelError(f"teacher.model has no plain attention in its last block, or one block only; {ADVICE}")
    return model


def _check_probe(model: nn.Module) -> tuple[TimmTransformer, AttentionPoolLatent]:
    """timm's ViT and its pooling head, if tokens go from the blocks through one norm to the head, and nothing follows."""
    trunk = model.trunk
    assert isinstance(trunk, TimmTransformer)
    head = trunk.attn_pool
    whole = isinstance(head, AttentionPoolLatent) and head.mlp is not None
    bare = (trunk.fc_norm, trunk.head, trunk.patch_embed.norm)
    placed = trunk.pos_embed is not None and not trunk.num_prefix_tokens
    if not whole or not placed or head.latent_len != 1 or head.pos_embed is not None:
        raise ModelError(f"teacher.model is a ViT of timm that is not pooled as SigLIP is; {ADVICE}, or a SigLIP")
    if len(model.head) or not all(isinstance(part, nn.Identity) for part in bare):
        raise ModelError(
            f"teacher.model has a projection behind its pooling head, as no SigLIP has; {ADVICE}, or a SigLIP"
        )
    return trunk, head
