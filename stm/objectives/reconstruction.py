"""Pixel reconstruction (MAE, VideoMAE): mean squared error to each tubelet's pixels, optionally normalised."""

import torch
from torch import Tensor

from stm.tubelets import gather_tokens, split_tubelets, to_unit

EPSILON = 1e-6  # added to the standard deviation, as in VideoMAE


def gather_pixels(video: Tensor, index: Tensor, tubelet: int, patch: int) -> Tensor:
    """Return the pixels of selected tokens, in [0, 1], float32 [B, M, tubelet * patch^2, 3].

    Args:
        video: [B, T, 3, S, S], uint8, or float in [0, 1].
        index: int64 [B, M], token indices.
    """
    tubelets = gather_tokens(split_tubelets(video, tubelet, patch), index).transpose(2, 3)
    return to_unit(tubelets) if tubelets.dtype == torch.uint8 else tubelets.to(torch.float32)


def pixel_statistics(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased standard deviation + EPSILON per token and colour, [B, M, 1, 3] each."""
    deviation = pixels.var(dim=2, unbiased=True, keepdim=True).sqrt() + EPSILON
    return pixels.mean(dim=2, keepdim=True), deviation


def reconstruction_targets(video: Tensor, index: Tensor, tubelet: int, patch: int, normalised: bool = True) -> Tensor:
    """Compute the targets for the tokens at `index`.

    Args:
        video: [B, T, 3, S, S], uint8, or float in [0, 1].
        index: int64 [B, M], token indices.
        tubelet: frames per token.
        patch: pixels per side of a token.
        normalised: whether pixels are normalised per token and per colour; otherwise they stay in [0, 1] (VideoMAE's
            `normlize_target=False`).

    Returns:
        float32 [B, M, tubelet * patch^2 * 3], ordered frame, row, column, colour, like the decoder's outputs.
    """
    pixels = gather_pixels(video, index, tubelet, patch)
    if not normalised:
        return pixels.flatten(2)
    mean, deviation = pixel_statistics(pixels)
    return ((pixels - mean) / deviation).flatten(2)


def reconstruction_loss(predictions: Tensor, targets: Tensor) -> Tensor:
    """Scalar mean squared error over all predicted values, in float32 or wider.

    Raises:
        ValueError: the shapes differ.
    """
    if predictions.shape != targets.shape:
        raise ValueError(f"predictions {tuple(predictions.shape)} and targets {tuple(targets.shape)} differ in shape")
    dtype = torch.promote_types(predictions.dtype, torch.float32)
    return torch.nn.functional.mse_loss(predictions.to(dtype), targets.to(dtype))
