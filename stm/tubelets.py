"""Tubelets: the only module that defines the order of pixels within a token.

A token is a tubelet of `tubelet` frames of `patch` x `patch` pixels. Its index is `slot * N + row * side + column`, with
N tokens per slot. Within a token, values are ordered channel, frame, row, column, as in a 3-D convolution's weight.
This module depends only on torch.
"""

import torch
from torch import Tensor, nn

# ImageNet's RGB mean and standard deviation for pixels in [0, 1], as used by VideoMAE, UMT and TGM.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def split_tubelets(video: Tensor, tubelet: int, patch: int) -> Tensor:
    """Split a video [B, T, C, H, W] into tubelets [B, tokens, C, tubelet * patch^2] of the same dtype."""
    batch, frames, channels, height, width = video.shape
    rows, columns = height // patch, width // patch
    parts = video.reshape(batch, frames // tubelet, tubelet, channels, rows, patch, columns, patch)
    parts = parts.permute(0, 1, 4, 6, 3, 2, 5, 7)  # batch, slot, row, column | channel, frame, pixel row, pixel column
    return parts.reshape(batch, -1, channels, tubelet * patch * patch)


def join_tubelets(tubelets: Tensor, tubelet: int, patch: int, side: int) -> Tensor:
    """Invert `split_tubelets` for square frames: [B, tokens, C, tubelet * patch^2] -> [B, T, C, S, S]."""
    batch, _, channels, _ = tubelets.shape
    parts = tubelets.reshape(batch, -1, side, side, channels, tubelet, patch, patch)
    parts = parts.permute(0, 1, 5, 4, 2, 6, 3, 7)
    return parts.reshape(batch, -1, channels, side * patch, side * patch)


def gather_tokens(tokens: Tensor, index: Tensor) -> Tensor:
    """Select tokens by index: [B, L, ...] and int64 [B, K] -> [B, K, ...]."""
    shape = index.shape + (1,) * (tokens.dim() - 2)
    return tokens.gather(1, index.view(shape).expand(*index.shape, *tokens.shape[2:]))


def to_unit(pixels: Tensor) -> Tensor:
    """Convert uint8 pixels to float32 in [0, 1]."""
    return pixels.to(torch.float32) / 255


class Normalise(nn.Module):
    """Subtracts ImageNet's mean and divides by its standard deviation; input is uint8, or float in [0, 1]."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, shape: tuple[int, ...]) -> None:
        """Set the shape in which the three channels broadcast, such as (3, 1) for tubelets [B, K, 3, pixels]."""
        super().__init__()
        # Buffers, because creating a tensor from a list in the forward pass would synchronise the device for a copy.
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(shape), persistent=False)
        self.register_buffer("deviation", torch.tensor(IMAGENET_STD).view(shape), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        unit = to_unit(pixels) if pixels.dtype == torch.uint8 else pixels
        return (unit - self.mean) / self.deviation
