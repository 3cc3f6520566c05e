"""Decoding of JPEGs on the training device: loading processes only read and check their bytes.

On CUDA torchvision decodes with nvJPEG, on a CPU with libjpeg-turbo. Crops are resized and mirrored as in `stm.data.resizing`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stm.data.crop_pixels import Allocate, allocate_pixels
from stm.data.resizing import resize_crops
from stm.data.samples import Sample


def join_jpegs(
    items: Sequence[Sequence[Sample]], allocate: Allocate = allocate_pixels
) -> tuple[NDArray[np.uint8], dict[str, Any]]:
    """Join the JPEGs of the samples of several clips; those that samples of a clip share occur once.

    Returns:
        The bytes of all JPEGs, uint8 [bytes], and what else is needed for `decode_batch`: "ends", the end of each JPEG in them;
        for each sample "frames", the JPEG of each of its frames, "frame_sizes", height and width, "boxes" and "flip";
        "size", the side after resizing, and "interpolation".
    """
    jpegs = [jpeg for samples in items for jpeg in samples[0]["jpegs"]]
    ends = np.cumsum([len(jpeg) for jpeg in jpegs]).tolist()
    data = allocate((ends[-1],))
    for jpeg, end in zip(jpegs, ends, strict=True):
        data[end - len(jpeg) : end] = np.frombuffer(jpeg, np.uint8)
    firsts = np.cumsum([0, *(len(samples[0]["jpegs"]) for samples in items)]).tolist()
    pairs = [(first, sample) for first, samples in zip(firsts, items, strict=False) for sample in samples]
    first_sample = items[0][0]
    return data, {
        "ends": ends,
        "frames": [[first + frame for frame in sample["frames"]] for first, sample in pairs],
        "frame_sizes": [sample["frame_size"] for _, sample in pairs],
        "boxes": [sample["box"] for _, sample in pairs],
        "flip": [sample["flip"] for _, sample in pairs],
        "size": first_sample["image_size"],
        "interpolation": first_sample["interpolation"],
    }


def decode_batch(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Replace the batch's "jpegs" (see `join_jpegs`, with the bytes as "data") by "video" uint8 [B, T, 3, S, S] on `device`.

    Returns:
        The batch, unchanged if it has no JPEGs.

    Raises:
        ValueError: a JPEG cannot be decoded, or a frame's size differs from that of the index.
    """
    if "jpegs" not in batch:
        return batch
    rest = {name: value for name, value in batch.items() if name != "jpegs"}
    return {"video": _decode_videos(**batch["jpegs"], keys=batch["key"], device=device), **rest}


def _decode_videos(
    data: Tensor,
    ends: list[int],
    frames: list[list[int]],
    frame_sizes: list[tuple[int, int]],
    boxes: list[Any],
    flip: list[bool],
    size: int,
    interpolation: Any,
    keys: list[str],
    device: torch.device,
) -> Tensor:
    from torchvision.io import ImageReadMode, decode_jpeg

    # torchvision takes their bytes from the CPU, whatever the device.
    jpegs = [data[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    try:
        images = decode_jpeg(jpegs, mode=ImageReadMode.RGB, device=device)
    except RuntimeError as error:
        if device.type == "cuda" and isinstance(error, torch.cuda.OutOfMemoryError):
            raise
        raise ValueError(
            f"frames of the clips {', '.join(dict.fromkeys(keys))} cannot be decoded on {device}: {error}. Set decode_on to "
            "loader, which names the frame if it is damaged"
        ) from error
    crops = []
    for key, own, (height, width), box in zip(keys, frames, frame_sizes, boxes, strict=True):
        video = torch.stack([images[number] for number in own]) if _fit(images, own, height, width) else None
        if video is None:
            raise ValueError(
                f"a frame of clip {key!r} is not {width}x{height} pixels as in the index: were files mixed up?"
            )
        crops.append(video[:, :, box.top : box.top + box.height, box.left : box.left + box.width].permute(0, 2, 3, 1))
    sides = torch.tensor([[box.height, box.width] for box in boxes]).to(device, non_blocking=True)
    return resize_crops(crops, sides, torch.tensor(flip).to(device, non_blocking=True), size, interpolation)


def _fit(images: Sequence[Tensor], numbers: Sequence[int], height: int, width: int) -> bool:
    return all(images[number].shape == (3, height, width) for number in numbers)
