"""Resizing and mirroring of crops on the training device instead of in loading processes, as matrix products.

Along one axis, each pixel of the result is a weighted mean of the crop's pixels. The weights of the rows and of the columns
form two small matrices per clip; for a mirrored clip, the column matrix is upside down. Padding has weight 0, so clips of any
size can be in one batch, and the host never waits for the device.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stm.config import Interpolation
from stm.data.crop_pixels import Allocate, allocate_pixels

# Parameter of the cubic convolution kernel in OpenCV and torch.
_CUBIC = -0.75


def join_crops(
    crops: Sequence[NDArray[np.uint8]],
    flips: Sequence[bool],
    size: int,
    interpolation: Interpolation = "area",
    allocate: Allocate = allocate_pixels,
) -> dict[str, Any]:
    """Pad samples' crops, uint8 [T, height, width, 3] of any sizes, to a batch, whose pixels are in memory from `allocate`.

    Returns:
        "pixels" uint8 [B, T, H, W, 3], padded at the bottom and right to the height of the tallest and the width of the widest
        crop, so never larger than the stored frames; "sides" int64 [B, 2], height and width; "flip" bool [B]; "size", the side
        after resizing; "interpolation".
    """
    sides = np.array([crop.shape[1:3] for crop in crops], dtype=np.int64)
    pixels = allocate((len(crops), len(crops[0]), *sides.max(axis=0).tolist(), 3))
    for place, crop in zip(pixels, crops, strict=True):
        height, width = crop.shape[1:3]
        place[:, :height, :width] = crop
        place[:, height:] = 0
        place[:, :height, width:] = 0
    parts = {"pixels": torch.from_numpy(pixels), "sides": torch.from_numpy(sides), "flip": torch.tensor(flips)}
    return {**parts, "size": size, "interpolation": interpolation}


def resize_batch(batch: dict[str, Any]) -> dict[str, Any]:
    """Replace the batch's "crops" (see `join_crops`) by "video" uint8 [B, T, 3, S, S]; return it unchanged if it has none."""
    if "crops" not in batch:
        return batch
    rest = {name: value for name, value in batch.items() if name != "crops"}
    return {"video": resize_crops(**batch["crops"]), **rest}


@torch.no_grad()
def resize_crops(
    pixels: Tensor | Sequence[Tensor],
    sides: Tensor,
    flip: Tensor,
    size: int,
    interpolation: Interpolation = "area",
) -> Tensor:
    """Resize and mirror crops like `stm.data.crop_pixels.FrameTransform`, to within one grey level: OpenCV rounds differently.

    Args:
        pixels: uint8 [B, T, H, W, 3]; the padding outside a crop's sides is ignored. Or B crops uint8 [T, height, width, 3].
        sides: height and width of each crop, int64 [B, 2].
        flip: which crops are mirrored left to right, bool [B].
        size: S, side of the result, in pixels.
        interpolation: as in `Augmentation`.

    Returns:
        uint8 [B, T, 3, S, S].
    """
    # Of the largest crop; smaller ones use the first columns of their matrices.
    largest = [max(crop.shape[1 + axis] for crop in pixels) for axis in (0, 1)]
    if interpolation == "bicubic":
        rows, columns = (weigh_cubic(sides[:, axis], size, largest[axis]) for axis in (0, 1))
    else:
        shrinks = (sides >= size).all(dim=1)
        rows, columns = (weigh_pixels(sides[:, axis], size, largest[axis], shrinks) for axis in (0, 1))
    columns = torch.where(flip[:, None, None], columns.flip(1), columns)
    # bf16 cannot distinguish adjacent grey levels.
    with torch.autocast(columns.device.type, enabled=False):
        # One clip at a time: all clips in float32 at once would need gigabytes.
        return torch.stack([_resize_clip(*clip) for clip in zip(pixels, rows, columns, strict=True)])


def _resize_clip(pixels: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    rows, columns = rows[:, : pixels.shape[1]], columns[:, : pixels.shape[2]]
    frames = pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    # Clamped, because the cubic kernel has negative weights.
    return (rows @ (frames @ columns.T)).round_().clamp_(0, 255).to(torch.uint8)


def weigh_pixels(sides: Tensor, size: int, pixels: int, shrinks: Tensor) -> Tensor:
    """The weight of each pixel along one axis in each pixel of the result.

    Args:
        sides: lengths of the crops along this axis, in pixels, int64 [B].
        size: S, pixels of the result.
        pixels: P, pixels of a crop with its padding.
        shrinks: bool [B]; True: average by area, like OpenCV's INTER_AREA; False: interpolate linearly, like INTER_LINEAR.

    Returns:
        float32 [B, S, P]; rows sum to 1.
    """
    pixel = torch.arange(pixels, device=sides.device)
    edges = sides[:, None] * torch.arange(size + 1, device=sides.device) / size  # the last one is exactly the side
    left, right = edges[:, :-1, None], edges[:, 1:, None]
    area = (torch.minimum(right, pixel + 1) - torch.maximum(left, pixel)).clamp(min=0) / (right - left)
    middle = ((left + right) / 2 - 0.5).clamp(min=0).minimum(sides[:, None, None] - 1)
    linear = (1 - (middle - pixel).abs()).clamp(min=0)
    return torch.where(shrinks[:, None, None], area, linear)


def weigh_cubic(sides: Tensor, size: int, pixels: int) -> Tensor:
    """Like `weigh_pixels`, for OpenCV's INTER_CUBIC: four pixels each; beyond a border, its pixel is repeated."""
    middle = (torch.arange(size, device=sides.device) + 0.5) * sides[:, None] / size - 0.5
    first = middle.floor() - 1
    weights = torch.zeros(len(sides), size, pixels, device=sides.device)
    for number in range(4):
        pixel = first + number
        x = (middle - pixel).abs()
        near = ((_CUBIC + 2) * x - (_CUBIC + 3)) * x**2 + 1
        far = _CUBIC * (((x - 5) * x + 8) * x - 4)
        place = pixel.clamp(min=0).minimum(sides[:, None] - 1).long()
        weights.scatter_add_(2, place[..., None], torch.where(x <= 1, near, far)[..., None])
    return weights
