"""Mixup and cutmix of a batch, equivalent to timm's `Mixup` in mode `batch`, as in VideoMAE's fine-tuning.

Clip i is mixed with clip B - 1 - i. All clips of a batch use the same proportion or the same box, which applies to all
frames. The random numbers depend only on (seed, index of the forward pass), so that a resumed run mixes exactly as an
uninterrupted one. They are sampled in the main process; the pixels are mixed on the model's device.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from stm.config import FineTuneAugmentation
from stm.data.loader import Batch


@dataclass(frozen=True)
class Draw:
    """The mixing parameters of one batch."""

    share: float = 1.0  # weight of a clip's own label and, without a box, of its own pixels
    box: tuple[int, int, int, int] | None = None  # region filled from the other clip: top, bottom, left, right

    def weights(self, size: int) -> Tensor:
        """The weights of a clip's own pixels and of the other clip's, float32 [2, size, size]."""
        if self.box is None:
            return torch.tensor([self.share, 1 - self.share])[:, None, None].expand(2, size, size)
        top, bottom, left, right = self.box
        own = torch.ones(size, size)
        own[top:bottom, left:right] = 0
        return torch.stack([own, 1 - own])


@dataclass(frozen=True)
class Mixing:
    """Mixes the batches of a run."""

    settings: FineTuneAugmentation
    seed: int

    def draw(self, number: int, size: int) -> Draw:
        """Samples the mixing parameters of forward pass `number`, for frames of `size` x `size` pixels.

        Samples the same values as timm, in the same order. timm uses numpy's global generator; this is a separate
        generator of the same kind, whose stream numpy guarantees never to change.
        """
        settings, random = self.settings, np.random.RandomState([self.seed, number])
        if random.rand() >= settings.mix_probability:
            return Draw()
        cut = settings.mixup == 0
        if settings.mixup > 0 and settings.cutmix > 0:
            cut = random.rand() < settings.mix_switch
        alpha = settings.cutmix if cut else settings.mixup
        share = float(random.beta(alpha, alpha))
        return _draw_box(random, share, size) if cut and share < 1 else Draw(share)

    def mixed(self, batches: Callable[[int], Iterator[Batch]], accumulate: int) -> Callable[[int], Iterator[Batch]]:
        """Adds the mixing weights to the batches: "pixel_weights" float32 [2, S, S], "label_weights" float32 [2].

        Args:
            batches: returns the batches from a given optimiser step onwards, see `stm.training.batches.feed`.
            accumulate: batches per step.
        """

        def stream(step: int) -> Iterator[Batch]:
            for number, batch in enumerate(batches(step), start=step * accumulate):
                size = batch["video"].shape[-1]
                draw = self.draw(number, size)
                shares = torch.tensor([draw.share, 1 - draw.share])
                yield {**batch, "pixel_weights": draw.weights(size), "label_weights": shares}

        return stream


def _draw_box(random: np.random.RandomState, share: float, size: int) -> Draw:
    """Samples a box with 1 - `share` of the frame's area around a random pixel.

    The box is clipped at the border, and the returned share is that of the clipped box.
    """
    side = int(size * np.sqrt(1 - share))
    middles = (int(random.randint(0, size)), int(random.randint(0, size)))
    low, high = zip(*((max(m - side // 2, 0), min(m + (side + 1) // 2, size)) for m in middles), strict=True)
    area = (high[0] - low[0]) * (high[1] - low[1])
    return Draw(1 - area / size**2, (low[0], high[0], low[1], high[1]))


def mix(values: Tensor, weights: Tensor) -> Tensor:
    """Mixes each row with its partner from the other end of the batch; the middle row of an odd batch is unchanged.

    Args:
        values: float [B, ...].
        weights: [2, ...], the weights of a row's own values and of its partner's.
    """
    return values * weights[0] + values.flip(0) * weights[1]


def soft_targets(label: Tensor, classes: int, smoothing: float) -> Tensor:
    """Smoothed one-hot targets, int64 [B] -> float32 [B, classes]: `smoothing` is spread evenly over all classes."""
    even = smoothing / classes
    # Instead of one_hot * (1 - smoothing) + even, so that the rounding matches timm's.
    hard = functional.one_hot(label, classes).bool()
    return torch.where(hard, 1.0 - smoothing + even, even)
