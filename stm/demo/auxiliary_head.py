"""An auxiliary classification head for training the demo's small models.

To learn textures and shapes from captions alone, models of this size need far more images than the recipe can afford:
after 700 steps, CLIP had learned only colors and backgrounds. During training, a linear layer therefore also classifies
the object and the background in CLIP's crops of whole objects and in each image token of BLIP-2. The layer is then
discarded.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from stm.datasets.moving_shapes.generate import BACKGROUNDS, COLORS, SHAPES, TEXTURES
from stm.demo.frames import NAMED, NOTHING, Frame

CLASSES: tuple[tuple[str, ...], ...] = (
    tuple(BACKGROUNDS),
    ("nothing", *COLORS),
    ("nothing", *TEXTURES),
    ("nothing", *SHAPES),
    ("nothing", "named", "other"),
)
"""The classes of each attribute of a token: background, and color, texture, shape and role of the object there."""

_MIN_COVER = 0.12  # minimum fraction of a token's pixels that its object covers


class AuxiliaryHead(nn.Module):
    """A linear classifier with one group of logits per attribute."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.sizes = [len(classes) for classes in CLASSES]
        self.linear = nn.Linear(width, sum(self.sizes))

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """The mean cross-entropy over attributes, a scalar; tokens [B, N, D], targets int64 [B, N, attributes].

        Few tokens show an object, so tokens with and without an object are weighted to contribute equally in total.
        """
        parts = self.linear(tokens).float().split(self.sizes, dim=-1)
        pairs = zip(parts, targets.unbind(-1), strict=True)
        each = sum(nn.functional.cross_entropy(p.transpose(1, 2), t, reduction="none") for p, t in pairs)
        occupied = (targets[..., -1] > 0).float()
        weight = occupied / occupied.sum().clamp(min=1) + (1 - occupied) / (1 - occupied).sum().clamp(min=1)
        return (each * weight).sum() / (2 * len(self.sizes))


def token_targets(frames: Sequence[Frame], side: int) -> Tensor:
    """The targets of a grid of `side` x `side` tokens per frame: uint8 [frames, side, side, attributes]."""
    return torch.from_numpy(np.stack([_table(frame)[_objects(frame.labels, side)] for frame in frames]))


def named_targets(frames: Sequence[Frame]) -> Tensor:
    """The targets of the named object of each frame: int64 [frames, attributes]."""
    return torch.from_numpy(np.stack([_table(frame)[1] for frame in frames])).long()


def _table(frame: Frame) -> npt.NDArray[np.uint8]:
    """[1 + objects, attributes]: the targets of the background, then of each object in label order."""
    background = BACKGROUNDS.index(frame.background)
    rows = [[background, 0, 0, 0, 0]]
    for number, attributes in enumerate((frame.named, *frame.others)):
        names = (*attributes, "other" if number else "named")
        rows.append([background, *(classes.index(n) for n, classes in zip(names, CLASSES[1:], strict=True))])
    return np.array(rows, np.uint8)


def _objects(labels: npt.NDArray[np.uint8], side: int) -> npt.NDArray[np.int64]:
    """[side, side]: the label of the object that covers most of each token; NOTHING below `_MIN_COVER`."""
    rows = np.arange(labels.shape[0]) * side // labels.shape[0]
    columns = np.arange(labels.shape[1]) * side // labels.shape[1]
    token = rows[:, None] * side + columns
    kinds = int(labels.max()) + 1
    counts = np.bincount((token * kinds + labels).ravel(), minlength=side * side * kinds).reshape(side, side, kinds)
    shares = counts / counts.sum(-1, keepdims=True)
    shares[..., NOTHING] = 0
    top = shares.argmax(-1)
    return np.where(shares.max(-1) >= _MIN_COVER, top, NOTHING) if kinds > NAMED else np.zeros((side, side), np.int64)
