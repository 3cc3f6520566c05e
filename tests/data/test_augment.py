"""RandAugment and random erasing, against timm on single pictures and against their descriptions."""

import math
import random
from copy import deepcopy

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing

from stm.data.augment import RandAugment, draw_erased, erase
from stm.data.crop_boxes import Box
from stm.tubelets import IMAGENET_MEAN, IMAGENET_STD

POLICY = "rand-m7-n4-mstd0.5-inc1"
SIZE = 48


def picture(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)


def test_a_change_is_what_timm_does_to_a_single_picture_with_the_same_draws() -> None:
    augment = RandAugment(POLICY, SIZE)
    timms = rand_augment_transform(POLICY, {"translate_const": 21, "interpolation": Image.Resampling.BICUBIC})
    changed = 0
    for seed in range(40):
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        expected = np.asarray(timms(Image.fromarray(picture(seed))))
        np.testing.assert_array_equal(augment.apply(picture(seed), seed), expected)
        changed += not np.array_equal(expected, picture(seed))
    assert changed > 20


def test_all_pictures_get_the_same_change_and_a_generator_always_the_same() -> None:
    augment = RandAugment(POLICY, SIZE)
    results = set()
    for seed in range(20):
        change = augment.draw(np.random.default_rng(seed))
        first = change(picture())
        change(picture(1))
        np.testing.assert_array_equal(change(picture()), first)
        np.testing.assert_array_equal(RandAugment(POLICY, SIZE).draw(np.random.default_rng(seed))(picture()), first)
        results.add(first.tobytes())
    assert len(results) > 15


def test_the_global_generators_are_neither_read_nor_moved() -> None:
    change = RandAugment(POLICY, SIZE).draw(np.random.default_rng(0))
    found = []
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        before = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
        found.append(change(picture()))
        assert (random.getstate(), np.random.get_state()[1].tolist()) == before  # noqa: NPY002
    np.testing.assert_array_equal(found[0], found[1])


def test_it_survives_the_way_to_a_worker_process() -> None:
    augment = RandAugment(POLICY, SIZE)
    copy = deepcopy(augment)  # by the same protocol as a copy to a worker process
    np.testing.assert_array_equal(copy.apply(picture(), 5), augment.apply(picture(), 5))


@pytest.mark.parametrize("policy", ["augmix-m3", "rand-k3", "rand-mx7.5"])
def test_a_policy_that_timm_does_not_know_is_refused(policy: str) -> None:
    with pytest.raises(ValueError, match=f"augmentation.auto_augment: '{policy}' is not a policy"):
        RandAugment(policy, SIZE)


def draw_boxes(count: int, size: int) -> list[Box]:
    generator = np.random.default_rng(0)
    boxes = [draw_erased(generator, 1.0, size) for _ in range(count)]
    found = [box for box in boxes if box is not None]
    assert len(found) == count
    return found


def test_erased_boxes_lie_inside_and_keep_to_area_and_aspect() -> None:
    size = 224
    for box in draw_boxes(2_000, size):
        assert box.left >= 0 and box.top >= 0 and box.left + box.width <= size and box.top + box.height <= size
        assert 0.02 - 0.002 < box.width * box.height / size**2 < 1 / 3 + 0.005
        assert 0.3 * 0.96 < box.height / box.width < 1 / 0.3 * 1.04


def test_erased_boxes_are_distributed_as_timm_s() -> None:
    size, count = 64, 3_000
    random.seed(0)
    eraser = RandomErasing(1.0, mode="const", device="cpu")
    timms = []
    for _ in range(count):
        erased = eraser(torch.ones(1, size, size))[0].numpy() == 0
        rows, columns = np.flatnonzero(erased.any(axis=1)), np.flatnonzero(erased.any(axis=0))
        timms.append((columns[0], rows[0], len(columns), len(rows)))
    ours, theirs = np.array(draw_boxes(count, size), dtype=float), np.array(timms, dtype=float)
    for moment in (1, 2):
        first, second = ours**moment, theirs**moment
        error = np.sqrt((first.var(axis=0) + second.var(axis=0)) / count)
        assert (np.abs(first.mean(axis=0) - second.mean(axis=0)) < 5 * error).all()


def test_erasing_happens_with_its_probability() -> None:
    generator = np.random.default_rng(1)
    share = np.mean([draw_erased(generator, 0.25, 32) is not None for _ in range(4_000)])
    assert abs(share - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 4_000)
    assert draw_erased(generator, 0.0, 32) is None


def test_noise_fills_the_box_of_all_frames_and_nothing_else() -> None:
    video = np.full((4, 3, 40, 40), 7, dtype=np.uint8)
    erase(np.random.default_rng(2), video, Box(left=5, top=10, width=20, height=12))
    outside = np.ones((40, 40), dtype=bool)
    outside[10:22, 5:25] = False
    assert (video[:, :, outside] == 7).all()
    inside = video[:, :, 10:22, 5:25]
    assert not np.array_equal(inside[0], inside[1]) and not np.array_equal(inside[:, 0], inside[:, 1])
    assert len(np.unique(inside[0, 0])) > 50


def test_noise_is_normal_where_pixels_are_normalised() -> None:
    video = np.zeros((8, 3, 100, 100), dtype=np.uint8)
    erase(np.random.default_rng(3), video, Box(0, 0, 100, 100))
    for color, (mean, deviation) in enumerate(zip(IMAGENET_MEAN, IMAGENET_STD, strict=True)):
        for level in (
            0,
            60,
            128,
            200,
            254,
        ):  # share of bytes up to the level, of a normal number that is rounded and cut
            expected = 0.5 * (1 + math.erf(((level + 0.5) / 255 - mean) / deviation / math.sqrt(2)))
            found = (video[:, color] <= level).mean()
            assert abs(found - expected) < 5 * math.sqrt(expected * (1 - expected) / 80_000)
