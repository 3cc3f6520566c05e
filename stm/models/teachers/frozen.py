"""What all frozen teachers share: pixels as they expect them, no gradients, evaluation mode for ever."""

from collections.abc import Sequence
from typing import Any, Self

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn
from torch.nn import functional

from stm.pretrained.hub import ModelError
from stm.tubelets import IMAGENET_MEAN, IMAGENET_STD, to_unit


class FrozenTeacher(nn.Module):
    """A frozen image model that looks at a clip's frames. A subclass adds the model, then calls `freeze`."""

    mean: Tensor
    deviation: Tensor
    identity: dict[str, Any] | None = None  # for receipts: the model and the hash of its weights, where it was loaded

    def __init__(
        self,
        patch: int,
        side: int,
        image_size: int | None = None,
        mean: Sequence[float] = IMAGENET_MEAN,
        deviation: Sequence[float] = IMAGENET_STD,
    ) -> None:
        """
        Args:
            patch: side of the model's patches, in pixels.
            side: the student's tokens on a side of a slot.
            image_size: side its frames are resized to, in pixels; by default `side` of its own patches, so that each
                of them is a token.
            mean, deviation: what is taken off the pixels, in [0, 1]. The default is UMT's: its release gives the
                CLIP the student's pixels with ImageNet's statistics, not those that CLIP was trained with.

        Raises:
            ModelError: the size is no whole number of its patches.
        """
        super().__init__()
        self.image_size = image_size or side * patch
        if self.image_size % patch:
            raise ModelError(f"teacher.image_size {self.image_size} is not a multiple of its patches' {patch} pixels")
        self.cells = self.image_size // patch  # its patches on a side
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("deviation", torch.tensor(deviation).view(3, 1, 1), persistent=False)

    def freeze(self) -> None:
        """Ends the set-up: no parameter learns."""
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> Self:
        """Stays in evaluation mode, whatever the method around it does."""
        return super().train(False)

    def prepare(self, frames: Tensor) -> Tensor:
        """Its input: uint8 frames [F, 3, S, S] -> float32 [F, 3, image_size, image_size], normalised."""
        pixels = (to_unit(frames) - self.mean) / self.deviation
        if pixels.shape[-1] != self.image_size:  # as UMT resizes: bicubic, without antialiasing
            size = (self.image_size, self.image_size)
            pixels = functional.interpolate(pixels, size, mode="bicubic", align_corners=False)
        return pixels


def resize_positions(table: Tensor, cells: int, class_tokens: int, grid: tuple[int, int] | None = None) -> nn.Parameter:
    """A position embedding for another number of patches, interpolated as open_clip does when it loads a model.

    Args:
        table: float [class_tokens + patches, D].
        cells: patches on a side, from now on.
        class_tokens: rows at the beginning that stand for no patch; they stay as they are.
        grid: rows and columns of patches so far; None: it is a square.

    Returns:
        Float [class_tokens + cells^2, D], a copy that does not learn; equal to `table` where the number is right.
    """
    old = None if grid is None else list(grid)
    resized = resample_abs_pos_embed(table[None].detach(), [cells, cells], old, class_tokens)
    return nn.Parameter(resized[0].clone(), requires_grad=False)
