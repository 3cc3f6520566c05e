"""Image towers as teachers of single frames: one interface over open_clip's, timm's and transformers' models.

Two families: a class token that the last block reads the frame with (CLIP), and a head whose learned query, the probe,
reads all tokens (SigLIP). Both are attention of one query, so both can read a part of the frame as well.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

Part = Literal["query", "key", "value"]
PARTS: tuple[Part, ...] = ("query", "key", "value")  # in the order in which joint weights hold them


class View(NamedTuple):
    """What a tower says of F frames of N patches."""

    features: Tensor  # [layers, F, N, C], see `Tower.to_joint`
    attention: Tensor  # float32 [F, N], of the pooling's query, mean of the heads
    tokens: Tensor  # [F, N, D], what the pooling reads
    class_token: Tensor | None  # [F, 1, D], what the pooling asks with; None: a probe, the same for all frames
    stem: Tensor  # [F, N, S], the patches' embedding before positions are added


class LoadedTower(NamedTuple):
    """A tower with what its files say of it."""

    tower: "Tower"
    identity: dict[str, str | None]
    mean: tuple[float, ...] | None  # of the pixels it was trained with, in [0, 1]; None: the files do not say
    deviation: tuple[float, ...] | None


class Tower(nn.Module, ABC):
    """A ViT with the pooling head that it was trained with. It computes in the precision of its weights."""

    patch: int  # pixels
    heads: int  # of the attention that pools
    token_width: int  # D
    stem_width: int  # S
    feature_width: int  # C, of the space that it shares with its text tower

    @abstractmethod
    def resize(self, cells: int) -> None:
        """Makes its positions those of `cells` x `cells` patches."""

    @abstractmethod
    def embed(self, pixels: Tensor) -> Tensor:
        """The patches' embedding alone: pixels [F, 3, height, width] -> the stem [F, N, S]."""

    @abstractmethod
    def enter(self, stem: Tensor) -> Tensor:
        """What goes into the first block: [F, N, S] -> [F, 1 + N with a class token, else N, D]."""

    @property
    @abstractmethod
    def blocks(self) -> Iterable[Callable[[Tensor], Tensor]]:
        """Its blocks, each from states to states of the same shape."""

    @property
    @abstractmethod
    def depth(self) -> int:
        """How many blocks it has."""

    @abstractmethod
    def to_joint(self, tokens: Tensor) -> Tensor:
        """Outputs of a block [..., D] -> the joint space [..., C]: the final norm, then CLIP's projection."""

    @abstractmethod
    def project(self, states: Tensor, part: Part) -> Tensor:
        """The pooling attention's query, key or value map of [F, M, D], split into heads: [F, heads, M, D / heads]."""

    @abstractmethod
    def run(self, pixels: Tensor, layers: int) -> View:
        """Looks at frames.

        Args:
            pixels: float [F, 3, height, width], normalised, of the size that `resize` made it ready for.
            layers: how many of its last blocks to return features of, 1 to `depth`.
        """

    @abstractmethod
    def pool(self, tokens: Tensor, class_token: Tensor | None, near: Tensor) -> Tensor:
        """Its own pooling, of a part of the frame for each token.

        Args:
            tokens, class_token: as `run` returned them, [F, N, D] and [F, 1, D].
            near: bool [N, N]; row i says which tokens the i-th result is of. No row is empty.

        Returns:
            [F, N, C]. Where a row holds all tokens this is the model's embedding of the image.
        """

    @abstractmethod
    def average(self, tokens: Tensor, class_token: Tensor | None, shares: Tensor) -> Tensor:
        """Means of tokens in the joint space: as `pool`, with float `shares` [N, N], whose rows sum to 1."""


class ClassTokenTower(Tower):
    """CLIP: the class token of the last block's output is the image's embedding.

    Its pooling is the last block with the class token as the only query, so the tokens that it reads are the input of
    that block.
    """

    @abstractmethod
    def finish(self, states: Tensor, mixed: Tensor) -> Tensor:
        """The last block behind its attention: its input [F, M, D] and mixed values [F, M, D] -> its output."""

    def run(self, pixels: Tensor, layers: int) -> View:
        stem = self.embed(pixels)
        states = before = self.enter(stem)
        features = []
        for number, block in enumerate(self.blocks):
            before, states = states, block(states)
            if number >= self.depth - layers:
                features.append(self.to_joint(states[:, 1:]))
        # One query, the class token: the weights are those of the whole block at a fraction of its cost.
        attention = spread(self.project(before[:, :1], "query"), self.project(before, "key"))
        return View(torch.stack(features), attention[:, 1:], before[:, 1:], before[:, :1], stem)

    def pool(self, tokens: Tensor, class_token: Tensor | None, near: Tensor) -> Tensor:
        assert class_token is not None
        states = torch.cat([class_token, tokens], dim=1)
        allowed = torch.cat([near.new_ones(len(near), 1), near], dim=1)  # it attends to itself as well
        query = self.project(class_token, "query").expand(-1, -1, len(near), -1)
        mixed = attend(query, self.project(states, "key"), self.project(states, "value"), allowed)
        return self.to_joint(self.finish(class_token.expand(-1, len(near), -1), mixed))

    def average(self, tokens: Tensor, class_token: Tensor | None, shares: Tensor) -> Tensor:
        assert class_token is not None
        states = torch.cat([class_token, tokens], dim=1)
        *_, last = self.blocks
        return self.to_joint(shares.to(states.dtype) @ last(states)[:, 1:])


class ProbeTower(Tower):
    """SigLIP: a learned query reads the normalised tokens; what it brings home is in the joint space already."""

    @abstractmethod
    def ask(self) -> Tensor:
        """The probe, [1, 1, D]."""

    @abstractmethod
    def finish(self, mixed: Tensor) -> Tensor:
        """The head behind its attention: mixed values [F, M, D] -> [F, M, C]."""

    def run(self, pixels: Tensor, layers: int) -> View:
        stem = self.embed(pixels)
        states, features = self.enter(stem), []
        for number, block in enumerate(self.blocks):
            states = block(states)
            if number >= self.depth - layers:
                features.append(self.to_joint(states))
        tokens = features[-1]
        query = self.project(self.ask(), "query").expand(len(tokens), -1, -1, -1)
        return View(torch.stack(features), spread(query, self.project(tokens, "key")), tokens, None, stem)

    def pool(self, tokens: Tensor, class_token: Tensor | None, near: Tensor) -> Tensor:
        query = self.project(self.ask(), "query").expand(len(tokens), -1, len(near), -1)
        return self.finish(attend(query, self.project(tokens, "key"), self.project(tokens, "value"), near))

    def average(self, tokens: Tensor, class_token: Tensor | None, shares: Tensor) -> Tensor:
        return shares.to(tokens.dtype) @ tokens


# ------------------------------------------------------------------------------------------------------- attention


def split_heads(states: Tensor, heads: int) -> Tensor:
    """[F, M, D] -> [F, heads, M, D / heads]."""
    return states.unflatten(-1, (heads, -1)).transpose(1, 2)


def project_joint(attention: nn.MultiheadAttention, states: Tensor, part: Part) -> Tensor:
    """One map of torch's attention, whose weights are joint, split into heads."""
    number = PARTS.index(part)
    weight, bias = (joint.chunk(3)[number] for joint in (attention.in_proj_weight, attention.in_proj_bias))
    return split_heads(functional.linear(states, weight, bias), attention.num_heads)


def attend(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor) -> Tensor:
    """Attention of [F, heads, M, d] to [F, heads, N, d] where bool [M, N] allows it -> [F, M, heads * d].

    Masked, so that a window of any size costs what the whole frame does, and that the softmax is exact.
    """
    mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=allowed)
    return mixed.transpose(1, 2).flatten(2)


def spread(query: Tensor, key: Tensor) -> Tensor:
    """How one query's attention is spread, the mean of the heads: [F, heads, 1, d], [F, heads, N, d] -> float32 [F, N]."""
    logits = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    return logits[:, :, 0].float().softmax(dim=-1).mean(dim=1)
