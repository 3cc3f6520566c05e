"""open_clip's image towers as teachers: its ViT with a class token (CLIP) and timm's ViT with a pooling head (SigLIP)."""

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
    ProbeTower,
    Projection,
    Tower,
    project_joint,
    resize_positions,
    split_heads,
)
from stm.pretrained.clip import load_clip
from stm.pretrained.hub import ModelError

ADVICE = "use a CLIP with a class token, for instance ViT-B-16-quickgelu@openai"


def load_open_clip(name: str) -> LoadedTower:
    """Load the image tower of the open_clip model that a config names, on the CPU, in float32.

    Raises:
        ModelError: it cannot be loaded, or belongs to neither family.
    """
    clip = load_clip(name, device="cpu", setting="teacher.model")
    scale = float(clip.model.logit_scale.detach().exp())
    return LoadedTower(make_tower(clip.model.visual), dict(clip.identity), clip.mean, clip.std, scale)


def make_tower(model: nn.Module) -> Tower:
    """Wrap open_clip's `visual` in a tower; `visual` is modified in place."""
    # open_clip wraps a timm model in a module, as its attribute `trunk`.
    trunk = getattr(model, "trunk", None)
    if isinstance(trunk, TimmTransformer) and trunk.attn_pool is not None:
        return TimmProbeTower(model)
    return OpenClipTower(model)


class OpenClipTower(ClassTokenTower):
    """open_clip's ViT, with or without a norm before the blocks, with any activation."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = _check_class_token(model)
        self.last: ResidualAttentionBlock = self.model.transformer.resblocks[-1]
        self.patch = self.model.patch_size[0]
        self.heads = self.last.attn.num_heads
        self.depth = len(self.model.transformer.resblocks)
        self.token_width = self.stem_width = self.convolution.out_channels
        self.feature_width = self.model.proj.shape[1]

    def resize(self, patches_per_side: int) -> None:
        model = self.model
        model.positional_embedding = resize_positions(
            model.positional_embedding, patches_per_side, 1, tuple(model.grid_size)
        )
        model.grid_size = (patches_per_side, patches_per_side)
        model.image_size = tuple(patches_per_side * side for side in model.patch_size)

    @property
    def convolution(self) -> nn.Conv2d:
        return self.model.conv1

    def run_blocks(self, pixels: Tensor, numbers: Sequence[int]) -> list[Tensor]:
        outputs = self.model.forward_intermediates(
            self.cast(pixels),
            indices=list(numbers),
            stop_early=True,
            intermediates_only=True,
            output_fmt="NLC",
            output_extra_tokens=True,
        )
        pairs = zip(outputs["image_intermediates_prefix"], outputs["image_intermediates"], strict=True)
        return [torch.cat(pair, dim=1) for pair in pairs]

    def run_last(self, states: Tensor) -> Tensor:
        return self.last(states)

    def to_joint(self, tokens: Tensor) -> Tensor:
        return self.model.ln_post(tokens) @ self.model.proj

    def project(self, states: Tensor, part: Projection) -> Tensor:
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

    def resize(self, patches_per_side: int) -> None:
        table, grid = self.trunk.pos_embed[0], tuple(self.trunk.patch_embed.grid_size)
        self.trunk.set_input_size((patches_per_side * self.patch, patches_per_side * self.patch))
        # timm has resized the table with antialiasing.
        self.trunk.pos_embed = nn.Parameter(
            resize_positions(table, patches_per_side, 0, grid)[None], requires_grad=False
        )

    @property
    def convolution(self) -> nn.Conv2d:
        return self.trunk.patch_embed.proj

    def run_blocks(self, pixels: Tensor, numbers: Sequence[int]) -> list[Tensor]:
        return self.trunk.forward_intermediates(
            self.cast(pixels), indices=list(numbers), stop_early=True, intermediates_only=True, output_fmt="NLC"
        )

    def to_joint(self, tokens: Tensor) -> Tensor:
        return self.trunk.norm(tokens)

    def project(self, states: Tensor, part: Projection) -> Tensor:
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
    """Return the model, after checking that its embedding is the last block's class token.

    Raises:
        ModelError: the embedding is computed differently, or the last block's attention is not standard; the message
            suggests an alternative.
    """
    if not isinstance(model, VisionTransformer):
        raise ModelError(f"teacher.model: its image tower is a {type(model).__name__}, not an open_clip ViT; {ADVICE}")
    if model.attn_pool is not None or model.pool_type != "tok":
        pooling = "an attention pooler" if model.attn_pool is not None else f"{model.pool_type!r} pooling"
        raise ModelError(
            f"teacher.model uses {pooling}: it has no class token whose attention could guide a mask; {ADVICE}"
        )
    blocks = model.transformer.resblocks
    if len(blocks) < 2 or not isinstance(getattr(blocks[-1], "attn", None), nn.MultiheadAttention):
        raise ModelError(f"teacher.model needs at least two blocks, with standard attention in the last; {ADVICE}")
    return model


def _check_probe(model: nn.Module) -> tuple[TimmTransformer, AttentionPoolLatent]:
    """Return timm's ViT and its pooling head, after checking that only one norm is between them and nothing follows."""
    trunk = model.trunk
    assert isinstance(trunk, TimmTransformer)
    head = trunk.attn_pool
    whole = isinstance(head, AttentionPoolLatent) and head.mlp is not None
    bare = (trunk.fc_norm, trunk.head, trunk.patch_embed.norm)
    placed = trunk.pos_embed is not None and not trunk.num_prefix_tokens
    if not whole or not placed or head.latent_len != 1 or head.pos_embed is not None:
        raise ModelError(f"teacher.model is a timm ViT without SigLIP's pooling; {ADVICE}, or a SigLIP")
    if len(model.head) or not all(isinstance(part, nn.Identity) for part in bare):
        raise ModelError(f"teacher.model has a projection after its pooling head, unlike SigLIP; {ADVICE}, or a SigLIP")
    return trunk, head
