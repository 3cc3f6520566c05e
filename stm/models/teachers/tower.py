"""Image towers as teachers of single frames: one interface to the models of open_clip, timm and transformers.

There are two families: the frame is pooled by a class token in the last block (CLIP), or by a head with a learned query,
the probe (SigLIP). Both are attention with a single query, so both can also pool a part of the frame.

The libraries run the blocks. This module adds what they lack: the attention weights of that single query (timm's head
and torch's fused attention do not return them) and pooling a window around each token.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn
from torch.nn import functional

Projection = Literal["query", "key", "value"]
PROJECTIONS: tuple[Projection, ...] = ("query", "key", "value")  # in the order of joint weights


class TowerOutput(NamedTuple):
    """A tower's output for F frames of N patches."""

    features: Tensor  # [layers, F, N, C], see `Tower.to_joint`
    attention: Tensor  # float32 [F, N], of the pooling query, averaged over heads
    tokens: Tensor  # [F, N, D], input to the pooling
    class_token: Tensor | None  # [F, 1, D], the pooling query before its projection; None: a probe, the same for all
    stem: Tensor  # [F, N, S], patch embeddings before position embeddings are added


class LoadedTower(NamedTuple):
    """A tower and the metadata of its files."""

    tower: "Tower"
    identity: dict[str, str | None]
    mean: tuple[float, ...] | None  # of its training pixels, in [0, 1]; None: unknown
    deviation: tuple[float, ...] | None
    logit_scale: float | None = None  # by which its training multiplied cosines with texts; None: unknown


class Tower(nn.Module, ABC):
    """A ViT with the pooling head it was trained with, computing in the precision of its weights."""

    patch: int  # pixels
    heads: int  # of the pooling attention
    depth: int  # blocks
    token_width: int  # D
    stem_width: int  # S
    feature_width: int  # C, of the joint space with its text tower

    @abstractmethod
    def resize(self, patches_per_side: int) -> None:
        """Interpolates the position embedding to this many patches per side."""

    @property
    @abstractmethod
    def convolution(self) -> nn.Conv2d:
        """The convolution that embeds the patches."""

    @abstractmethod
    def run_blocks(self, pixels: Tensor, numbers: Sequence[int]) -> list[Tensor]:
        """Returns the outputs of some blocks.

        Args:
            pixels: as in `run`.
            numbers: block indices from 0, ascending. Blocks after the last of them need not run.

        Returns:
            One tensor per index, [F, M, D]: M is 1 + N with a class token, which comes first, and N without.
        """

    @abstractmethod
    def to_joint(self, tokens: Tensor) -> Tensor:
        """Block outputs [..., D] -> joint space [..., C]: the final norm, then CLIP's projection."""

    @abstractmethod
    def project(self, states: Tensor, part: Projection) -> Tensor:
        """The pooling's query, key or value projection, split into heads: [F, M, D] -> [F, heads, M, D / heads]."""

    @abstractmethod
    def attend(self, pixels: Tensor) -> Tensor:
        """Returns only the attention of `run`, float32 [F, N], at lower cost."""

    @abstractmethod
    def run(self, pixels: Tensor, layers: int) -> TowerOutput:
        """Encodes frames.

        Args:
            pixels: float [F, 3, height, width], normalised, of the size set by `resize`.
            layers: number of last blocks whose features are returned, 1 to `depth`.
        """

    @abstractmethod
    def pool(self, tokens: Tensor, class_token: Tensor | None, near: Tensor) -> Tensor:
        """Applies the model's own pooling to a part of the frame for each token.

        Args:
            tokens, class_token: as `run` returned them, [F, N, D] and [F, 1, D].
            near: bool [N, N]; row i marks the tokens pooled into the i-th output. No row may be empty.

        Returns:
            [F, N, C]. If a row includes all tokens, this is the model's embedding of the image.
        """

    @abstractmethod
    def average(self, tokens: Tensor, class_token: Tensor | None, shares: Tensor) -> Tensor:
        """Like `pool`, but returns means in the joint space, weighted by float `shares` [N, N], whose rows sum to 1."""

    def cast(self, pixels: Tensor) -> Tensor:
        """Casts pixels to the precision of the weights."""
        return pixels.to(self.convolution.weight.dtype)

    def embed(self, pixels: Tensor) -> Tensor:
        """Pixels [F, 3, height, width] -> the stem [F, N, S]: patch embeddings before position embeddings are added.

        No library returns them together with the block outputs. Recomputing them costs almost nothing.
        """
        return self.convolution(self.cast(pixels)).flatten(2).transpose(1, 2)


class ClassTokenTower(Tower):
    """CLIP: the class token in the last block's output is the image embedding.

    Pooling is the last block with the class token as the only query, so its input is the input of that block.
    """

    @abstractmethod
    def run_last(self, states: Tensor) -> Tensor:
        """The last block: [F, 1 + N, D] -> the same shape."""

    @abstractmethod
    def finish(self, states: Tensor, mixed: Tensor) -> Tensor:
        """The rest of the last block after its attention: block input [F, M, D] and attended values [F, M, D] -> output."""

    def attend(self, pixels: Tensor) -> Tensor:
        return self._read(self.run_blocks(pixels, [self.depth - 2])[0])

    def run(self, pixels: Tensor, layers: int) -> TowerOutput:
        # At least two: the attention is computed from the last block's input, which is the second-to-last block's output.
        states = self.run_blocks(pixels, range(self.depth - max(layers, 2), self.depth))
        before = states[-2]
        features = torch.stack([self.to_joint(layer[:, 1:]) for layer in states[-layers:]])
        return TowerOutput(features, self._read(before), before[:, 1:], before[:, :1], self.embed(pixels))

    def _read(self, before: Tensor) -> Tensor:
        """The last block's attention from the class token to the patches; its input [F, 1 + N, D] -> float32 [F, N]."""
        # A single query gives the same weights at a fraction of the block's cost.
        return weigh(self.project(before[:, :1], "query"), self.project(before, "key"))[:, 1:]

    def pool(self, tokens: Tensor, class_token: Tensor | None, near: Tensor) -> Tensor:
        assert class_token is not None
        states = torch.cat([class_token, tokens], dim=1)
        allowed = torch.cat([near.new_ones(len(near), 1), near], dim=1)  # it also attends to itself
        query = self.project(class_token, "query").expand(-1, -1, len(near), -1)
        mixed = mix(query, self.project(states, "key"), self.project(states, "value"), allowed)
        return self.to_joint(self.finish(class_token.expand(-1, len(near), -1), mixed))

    def average(self, tokens: Tensor, class_token: Tensor | None, shares: Tensor) -> Tensor:
        assert class_token is not None
        states = torch.cat([class_token, tokens], dim=1)
        return self.to_joint(shares.to(states.dtype) @ self.run_last(states)[:, 1:])


class ProbeTower(Tower):
    """SigLIP: a learned query pools the normalised tokens, and the head's output is already in the joint space."""

    @property
    @abstractmethod
    def probe(self) -> Tensor:
        """The learned query, [1, 1, D]."""

    @abstractmethod
    def finish(self, mixed: Tensor) -> Tensor:
        """The rest of the head after its attention: attended values [F, M, D] -> [F, M, C]."""

    def attend(self, pixels: Tensor) -> Tensor:
        return self._read(self.to_joint(self.run_blocks(pixels, [self.depth - 1])[0]))

    def run(self, pixels: Tensor, layers: int) -> TowerOutput:
        states = self.run_blocks(pixels, range(self.depth - layers, self.depth))
        features = torch.stack([self.to_joint(layer) for layer in states])
        return TowerOutput(features, self._read(features[-1]), features[-1], None, self.embed(pixels))

    def _read(self, tokens: Tensor) -> Tensor:
        """The head's attention to the normalised tokens: [F, N, D] -> float32 [F, N]."""
        query = self.project(self.probe, "query").expand(len(tokens), -1, -1, -1)
        return weigh(query, self.project(tokens, "key"))

    def pool(self, tokens: Tensor, class_token: Tensor | None, near: Tensor) -> Tensor:
        query = self.project(self.probe, "query").expand(len(tokens), -1, len(near), -1)
        return self.finish(mix(query, self.project(tokens, "key"), self.project(tokens, "value"), near))

    def average(self, tokens: Tensor, class_token: Tensor | None, shares: Tensor) -> Tensor:
        return shares.to(tokens.dtype) @ tokens


# ------------------------------------------------------------------------------------------------------- attention


def split_heads(states: Tensor, heads: int) -> Tensor:
    """[F, M, D] -> [F, heads, M, D / heads]."""
    return states.unflatten(-1, (heads, -1)).transpose(1, 2)


def project_joint(attention: nn.MultiheadAttention, states: Tensor, part: Projection) -> Tensor:
    """One projection of torch's attention, taken from its joint weights, split into heads."""
    number = PROJECTIONS.index(part)
    weight, bias = (joint.chunk(3)[number] for joint in (attention.in_proj_weight, attention.in_proj_bias))
    return split_heads(functional.linear(states, weight, bias), attention.num_heads)


def mix(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor) -> Tensor:
    """Attention from [F, heads, M, d] to [F, heads, N, d] under a bool mask [M, N] -> [F, M, heads * d].

    With a mask, shapes are fixed and the softmax is exact for any window size; the cost is that of full attention.
    """
    mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=allowed)
    return mixed.transpose(1, 2).flatten(2)


def weigh(query: Tensor, key: Tensor) -> Tensor:
    """Attention weights of one query, averaged over heads: [F, heads, 1, d] and [F, heads, N, d] -> float32 [F, N]."""
    # Scaled before the product, as in torch's attention, so that logits stay in range in half precision.
    logits = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    return logits[:, :, 0].float().softmax(dim=-1).mean(dim=1)


# ------------------------------------------------------------------------------------------------------- positions


def resize_positions(
    table: Tensor, patches_per_side: int, class_tokens: int, grid: tuple[int, int] | None = None
) -> nn.Parameter:
    """Interpolate a position embedding to a different number of patches: bicubic without antialiasing, as UMT does for CLIP.

    Args:
        table: float [class_tokens + patches, D].
        patches_per_side: new number of patches per side.
        class_tokens: leading rows that do not belong to patches; left unchanged.
        grid: current rows and columns of patches; None: a square.

    Returns:
        Float [class_tokens + patches_per_side^2, D], a frozen copy; equal to `table` if the number is unchanged.
    """
    old = None if grid is None else list(grid)
    resized = resample_abs_pos_embed(
        table[None].detach(), [patches_per_side, patches_per_side], old, class_tokens, antialias=False
    )
    return nn.Parameter(resized[0].clone(), requires_grad=False)
