"""Hints for the training of the demo's small models: what lies where.

From captions alone models of this size need far more pictures to find textures and shapes than a demo's recipe can afford:
700 steps of CLIP learned nothing but colors and backgrounds. While the models are trained, a linear layer therefore also
tells which object and which background lie there: of CLIP's crops of whole objects, and of each image token of BLIP-2.
The layers are thrown away afterwards.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from stm.datasets.moving_shapes.generate import BACKGROUNDS, COLORS, SHAPES, TEXTURES
from stm.demo.frames import NAMED, NOTHING, Frame

QUESTIONS: tuple[tuple[str, ...], ...] = (
    tuple(BACKGROUNDS),
    ("nothing", *COLORS),
    ("nothing", *TEXTURES),
    ("nothing", *SHAPES),
    ("nothing", "named", "other"),
)
"""The answers to each question about a token: background, and the color, texture, shape and role of the object there."""

_LEAST = 0.12  # share of a token's pixels that an object must cover to be the one there


class HintHead(nn.Module):
    """A linear layer with one group of outputs for each question."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.sizes = [len(answers) for answers in QUESTIONS]
        self.linear = nn.Linear(width, sum(self.sizes))

    def loss(self, tokens: Tensor, answers: Tensor) -> Tensor:
        """Mean cross-entropy over questions; tokens [B, N, D], answers int64 [B, N, questions]; a scalar.

        Most tokens show no object; those that do count as much together as all others together.
        """
        parts = self.linear(tokens).float().split(self.sizes, dim=-1)
        pairs = zip(parts, answers.unbind(-1), strict=True)
        each = sum(nn.functional.cross_entropy(p.transpose(1, 2), a, reduction="none") for p, a in pairs)
        shown = (answers[..., -1] > 0).float()
        weight = shown / shown.sum().clamp(min=1) + (1 - shown) / (1 - shown).sum().clamp(min=1)
        return (each * weight).sum() / (2 * len(self.sizes))


def answer_frames(frames: Sequence[Frame], side: int) -> Tensor:
    """The right answers for a grid of `side` x `side` tokens: uint8 [frames, side, side, questions]."""
    return torch.from_numpy(np.stack([_answer(frame, side) for frame in frames]))


def answer_named(frames: Sequence[Frame]) -> Tensor:
    """The right answers about the named object of each frame: int64 [frames, questions]."""
    return torch.from_numpy(np.stack([_table(frame)[1] for frame in frames])).long()


def _answer(frame: Frame, side: int) -> npt.NDArray[np.uint8]:
    return np.asarray(_table(frame)[_objects(frame.labels, side)])


def _table(frame: Frame) -> npt.NDArray[np.uint8]:
    """[1 + objects, questions]: the answers where nothing is, and about each object in the order of the labels."""
    background = BACKGROUNDS.index(frame.background)
    rows = [[background, 0, 0, 0, 0]]
    for number, looks in enumerate((frame.named, *frame.others)):
        names = (*looks, "other" if number else "named")
        rows.append([background, *(answers.index(n) for n, answers in zip(names, QUESTIONS[1:], strict=True))])
    return np.array(rows, np.uint8)


def _objects(labels: npt.NDArray[np.uint8], side: int) -> npt.NDArray[np.int64]:
    """[side, side]: the label of the object that covers most of each token, NOTHING where none covers enough."""
    rows = np.arange(labels.shape[0]) * side // labels.shape[0]
    columns = np.arange(labels.shape[1]) * side // labels.shape[1]
    token = rows[:, None] * side + columns
    kinds = int(labels.max()) + 1
    counts = np.bincount((token * kinds + labels).ravel(), minlength=side * side * kinds).reshape(side, side, kinds)
    shares = counts / counts.sum(-1, keepdims=True)
    shares[..., NOTHING] = 0
    most = shares.argmax(-1)
    return np.where(shares.max(-1) >= _LEAST, most, NOTHING) if kinds > NAMED else np.zeros((side, side), np.int64)
