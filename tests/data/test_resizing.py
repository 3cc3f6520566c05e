"""Crops resized on the device: the loader's to a grey level, from the same draws."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from reference_shards import same
from torch.nn.functional import interpolate
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as torchvision

from stm.config import Augmentation
from stm.data.crop_boxes import Box
from stm.data.crop_pixels import FrameTransform, cut_frames
from stm.data.geometry import Geometry
from stm.data.loader import ClipLoader, collate, move_ahead
from stm.data.resizing import join_crops, resize_batch, resize_crops

# Height, width and side of the result: shrunk, enlarged, as it is, and each along one side alone.
SIZES = [
    (256, 256, 224),
    (256, 340, 224),
    (448, 300, 224),
    (168, 192, 224),
    (168, 256, 224),
    (256, 168, 224),
    (64, 64, 64),
]


def noise(*shape: int) -> np.ndarray:
    """The hardest of pictures: neighbouring pixels have nothing in common."""
    return np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)


def resize(*crops: np.ndarray, size: int, flips: list[bool] | None = None) -> np.ndarray:
    return resize_crops(**join_crops(crops, flips or [False] * len(crops), size)).numpy()


@pytest.mark.parametrize(("height", "width", "size"), SIZES)
@pytest.mark.parametrize("flip", [False, True])
def test_crops_are_the_loader_s_to_a_grey_level(height: int, width: int, size: int, flip: bool) -> None:
    crop = noise(2, height, width)
    (found,) = resize(crop, size=size, flips=[flip])
    expected = cut_frames(list(crop), Box(0, 0, width, height), size, flip)
    assert found.shape == (2, 3, size, size) and found.dtype == np.uint8
    difference = np.abs(found.astype(int) - expected)
    assert difference.max() <= 1 and difference.mean() < 0.2  # rounding alone; of pictures one pixel apart it is 85


def test_a_shrunk_pixel_is_the_mean_over_the_area_that_it_covers() -> None:
    crop = noise(1, 20, 28)
    fine = crop[0].repeat(16, axis=0).repeat(16, axis=1).astype(float)  # 16 x 20 rows are 20 to each of 16 rows
    means = fine.reshape(16, 20, 16, 28, 3).mean(axis=(1, 3)).transpose(2, 0, 1)
    assert np.abs(resize(crop, size=16)[0, 0] - means).max() <= 0.501


def test_an_enlarged_pixel_lies_linearly_between_its_neighbours() -> None:
    crop = noise(1, 20, 28)
    pixels = torch.from_numpy(crop).permute(0, 3, 1, 2).float()
    expected = interpolate(pixels, (32, 32), mode="bilinear", align_corners=False).numpy()
    assert np.abs(resize(crop, size=32)[0] - expected).max() <= 0.501


@pytest.mark.parametrize(("height", "width", "size"), SIZES)
def test_bicubic_is_torchvisions_of_tensors_in_the_loader_and_on_the_device(height: int, width: int, size: int) -> None:
    """UMT resizes uint8 tensors, for which torchvision did not antialias: the cubic kernel over 4 x 4 pixels, rounded."""
    crop = noise(2, height, width)
    pixels = torch.from_numpy(crop).permute(0, 3, 1, 2)
    expected = torchvision.resize(pixels, [size, size], InterpolationMode.BICUBIC, antialias=False).numpy().astype(int)
    cut, loaded = (
        FrameTransform(Box(0, 0, width, height), interpolation="bicubic"),
        np.empty((2, 3, size, size), np.uint8),
    )
    for frame, place in zip(crop, loaded, strict=True):
        cut.write(frame, place)
    resized = resize_crops(**join_crops([crop], [False], size, "bicubic"))[0].numpy()
    for found in (loaded, resized):
        difference = np.abs(found - expected)
        assert difference.max() <= 1 and difference.mean() < 0.2
    if (height, width) != (size, size):
        assert np.abs(cut_frames(list(crop), Box(0, 0, width, height), size, False) - expected).mean() > 5  # averaged


def test_a_flip_mirrors_the_columns_of_its_own_clip() -> None:
    plain, other = noise(2, 40, 32), noise(2, 24, 36)
    straight, mirrored = (resize(plain, other, size=32, flips=[flip, False]) for flip in (False, True))
    assert np.array_equal(mirrored[0], straight[0, ..., ::-1]) and np.array_equal(mirrored[1], straight[1])


def test_neither_company_nor_padding_changes_a_byte() -> None:
    crops = [noise(2, 40, 30), noise(2, 24, 50), noise(2, 33, 33)]
    alone = np.concatenate([resize(crop, size=32) for crop in crops])
    joined = join_crops(crops, [False] * 3, 32)
    assert joined["pixels"].shape == (3, 2, 40, 50, 3) and joined["sides"].tolist() == [[40, 30], [24, 50], [33, 33]]
    assert np.array_equal(resize_crops(**joined).numpy(), alone)
    for padded, crop in zip(joined["pixels"], crops, strict=True):
        padded[:, crop.shape[1] :] = 255
        padded[:, :, crop.shape[2] :] = 255
    assert np.array_equal(resize_crops(**joined).numpy(), alone)


def test_a_step_in_half_precision_resizes_in_full() -> None:
    crops = join_crops([noise(1, 40, 50)], [True], 32)
    expected = resize_crops(**crops)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(resize_crops(**crops), expected)


def test_batches_differ_from_the_loader_s_in_the_rounding_of_pixels_alone(open_clips: Callable) -> None:
    settings: dict[str, Any] = {"batch_size": 3, "shuffle": True}
    for epoch in range(8):
        loaded = ClipLoader(open_clips(), **settings).batches(epoch)
        resized = move_ahead(ClipLoader(open_clips(resize=False), **settings).batches(epoch), torch.device("cpu"))
        for expected, found in zip(loaded, resized, strict=True):
            video, wanted = found.pop("video"), expected.pop("video")
            assert same(found, expected)
            assert video.shape == (6, 4, 3, 32, 32) and video.dtype == torch.uint8
            assert (video.int() - wanted.int()).abs().max() <= 1


def test_worker_processes_and_a_new_start_change_nothing(open_clips: Callable) -> None:
    data = open_clips(resize=False)
    expected = list(ClipLoader(data, 2, shuffle=True).batches(epoch=3))
    assert all(map(same, ClipLoader(data, 2, shuffle=True, workers=2).batches(epoch=3), expected))
    rest = list(ClipLoader(data, 2, shuffle=True).batches(epoch=3, start=4))
    assert len(rest) == 1 and same(rest[0], expected[2])


def test_images_and_evaluation_s_crops_are_resized_alike(open_clips: Callable) -> None:
    bicubic = Augmentation(crop="whole", interpolation="bicubic")
    for changes in (
        {"geometry": Geometry(32, 8, 1, 1)},
        {"train": False, "crops": 3},
        {"train": False, "whole": True, "augmentation": bicubic},
        {"augmentation": bicubic},
    ):
        data, other = open_clips(**changes), open_clips(**changes, resize=False)
        for number in range(len(data)):
            video = resize_batch(collate([other[number]]))["video"]
            assert (video.int() - collate([data[number]])["video"].int()).abs().max() <= 1


@pytest.mark.parametrize("late", [{"erasing": 0.5}, {"auto_augment": "rand-m7-n4-mstd0.5-inc1"}])
def test_what_changes_resized_pixels_is_refused(open_clips: Callable, late: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"augmentation: {next(iter(late))} operate"):
        open_clips(augmentation=Augmentation(**late), resize=False)


@pytest.mark.cuda
def test_cuda_resizes_to_a_grey_level_as_a_cpu_does() -> None:
    crops = join_crops([noise(2, 256, 340), noise(2, 168, 192)], [True, False], 224)
    on_cuda = resize_crops(**{**crops, **{name: crops[name].cuda() for name in ("pixels", "sides", "flip")}}).cpu()
    assert (on_cuda.int() - resize_crops(**crops).int()).abs().max() <= 1
