"""open_clip's image towers as teachers: its own ViT with a class token (CLIP), and timm's with a pooling head (SigLIP)."""

from collections.abc import Sequence
from typing import Any

import torch
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from timm.layers import AttentionPoolLatent
from timm.models.vision_transformer import VisionTransformer as TimmTransformer
from torch import Tensor, nn

from stm.models.teachers.frozen import resize_positions
from stm.models.teachers.tower import ClassTokenTower, LoadedTower, Part, ProbeTower, Tower, project_joint, split_heads
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
    """A tower around open_clip's `visual`, which is taken over."""
    trunk = getattr(model, "trunk", None)
    if isinstance(trunk, TimmTransformer) and trunk.attn_pool is not None:
        return TimmProbeTower(model)
    return OpenClipTower(model)


class OpenClipTower(ClassTokenTower):
    """open_clip's own ViT, with or without the norm before its blocks, with any activation."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = check_tower(model)
        self.last: ResidualAttentionBlock = self.model.transformer.resblocks[-1]
        self.patch, self.heads = self.model.patch_size[0], self.last.attn.num_heads
        self.token_width = self.stem_width = self.model.conv1.out_channels
        self.feature_width = self.model.proj.shape[1]

    def resize(self, cells: int) -> None:
        resize_tower(self.model, cells)

    def embed(self, pixels: Tensor) -> Tensor:
        convolution = self.model.conv1
        return convolution(pixels.to(convolution.weight.dtype)).flatten(2).transpose(1, 2)

    def enter(self, stem: Tensor) -> Tensor:
        token = self.model.class_embedding.to(stem.dtype).expand(len(stem), 1, -1)
        states = torch.cat([token, stem], dim=1)
        return self.model.ln_pre(states + self.model.positional_embedding.to(stem.dtype))

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return self.model.transformer.resblocks

    @property
    def depth(self) -> int:
        return len(self.blocks)

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
        self.trunk, self.head = _check_trunk(model)
        self.convolution: nn.Conv2d = self.trunk.patch_embed.proj
        self.patch, self.heads = self.convolution.kernel_size[0], self.head.num_heads
        self.token_width = self.stem_width = self.feature_width = self.convolution.out_channels

    def resize(self, cells: int) -> None:
        self.trunk.pos_embed = nn.Parameter(resize_positions(self.trunk.pos_embed[0], cells, 0)[None])

    def embed(self, pixels: Tensor) -> Tensor:
        return self.convolution(pixels.to(self.convolution.weight.dtype)).flatten(2).transpose(1, 2)

    def enter(self, stem: Tensor) -> Tensor:
        return self.trunk.norm_pre(stem + self.trunk.pos_embed.to(stem.dtype))

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return self.trunk.blocks

    @property
    def depth(self) -> int:
        return len(self.blocks)

    def to_joint(self, tokens: Tensor) -> Tensor:
        return self.trunk.norm(tokens)

    def project(self, states: Tensor, part: Part) -> Tensor:
        if part == "query":
            return self.head.q_norm(split_heads(self.head.q(states), self.heads))
        key, value = (split_heads(half, self.heads) for half in self.head.kv(states).chunk(2, dim=-1))
        return self.head.k_norm(key) if part == "key" else value

    def ask(self) -> Tensor:
        return self.head.latent

    def finish(self, mixed: Tensor) -> Tensor:
        pooled = self.head.proj(mixed)
        return pooled + self.head.mlp(self.head.norm(pooled))


def check_tower(model: nn.Module) -> VisionTransformer:
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


def resize_tower(model: VisionTransformer, cells: int) -> None:
    """Interpolates the position embedding of open_clip's ViT to `cells` x `cells` patches."""
    model.positional_embedding = resize_positions(model.positional_embedding, cells, 1, tuple(model.grid_size))
    model.grid_size = (cells, cells)
    model.image_size = tuple(cells * side for side in model.patch_size)


def _check_trunk(model: nn.Module) -> tuple[TimmTransformer, AttentionPoolLatent]:
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
