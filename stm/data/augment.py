"""Augmentation of a training clip's pixels alone: RandAugment and random erasing. All frames of a clip get the same."""

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from stm.data.crop_boxes import Box
from stm.tubelets import IMAGENET_MEAN, IMAGENET_STD

# What rotated and moved pictures show at their edges: VideoMAE's pictures have timm's plain grey there.
GREY = (128, 128, 128)

# Random erasing: least and largest share of the picture, least height / width; VideoMAE's and timm's.
ERASED_AREA = (0.02, 1 / 3)
ERASED_ASPECT = (0.3, 1 / 0.3)
# Boxes that do not fit are drawn again. VideoMAE tries 100 times for a clip, timm 10 times for a picture.
TRIES = 100


class RandAugment:
    """timm's RandAugment, drawn once a clip.

    VideoMAE applies it to whole frames before they are cropped; here it comes after crop and flip, where it costs less.
    """

    def __init__(self, policy: str, size: int) -> None:
        """
        Args:
            policy: timm's description, such as "rand-m7-n4-mstd0.5-inc1".
            size: side of the pictures, in pixels.

        Raises:
            ValueError: timm does not understand the policy.
        """
        from timm.data.auto_augment import rand_augment_transform  # takes seconds, and few runs need it

        settings = {"translate_const": int(0.45 * size), "img_mean": GREY, "interpolation": Image.Resampling.BICUBIC}
        try:
            self._transform = rand_augment_transform(policy, settings)
        except (AssertionError, KeyError, ValueError, TypeError) as error:
            raise ValueError(
                f"augmentation.auto_augment: {policy!r} is no policy of timm's RandAugment ({error}); "
                "one is rand-m7-n4-mstd0.5-inc1"
            ) from error

    def draw(self, generator: np.random.Generator) -> Callable[[NDArray[np.uint8]], NDArray[np.uint8]]:
        """A change of pictures uint8 [size, size, 3], the same for all that it is applied to."""
        return partial(self.apply, seed=int(generator.integers(2**32)))

    def apply(self, picture: NDArray[np.uint8], seed: int) -> NDArray[np.uint8]:
        """Changes a picture by the operations and strengths that follow from `seed`."""
        # timm draws anew in each call, from global generators: with the same seed it draws the same.
        with global_seed(seed):
            return np.asarray(self._transform(Image.fromarray(picture)))


@contextmanager
def global_seed(seed: int) -> Iterator[None]:
    """Seeds Python's and numpy's global generators, and puts them back as they were afterwards."""
    before, numpy_before = random.getstate(), np.random.get_state()  # noqa: NPY002  timm draws from this one
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(before)
        np.random.set_state(numpy_before)  # noqa: NPY002


def draw_erased(generator: np.random.Generator, probability: float, size: int) -> Box | None:
    """The box to erase from pictures of `size` x `size` pixels, or None: area uniform, aspect log-uniform, place uniform."""
    if generator.random() >= probability:
        return None
    for _ in range(TRIES):
        area = generator.uniform(*ERASED_AREA) * size * size
        aspect = math.exp(generator.uniform(math.log(ERASED_ASPECT[0]), math.log(ERASED_ASPECT[1])))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < height < size and 0 < width < size:
            top, left = (int(generator.integers(size - side + 1)) for side in (height, width))
            return Box(left, top, width, height)
    return None


def erase(generator: np.random.Generator, video: NDArray[np.uint8], box: Box) -> None:
    """Fills a box of all frames of a video uint8 [T, 3, S, S] with noise, another in each pixel, colour and frame; in place.

    The noise is timm's mode `pixel`: standard normal where pixels are normalised by ImageNet's mean and deviation. These
    pixels are bytes still, so it is turned back into bytes and cut off at black and white, 1.8 to 2.6 deviations away.
    """
    place = video[:, :, box.top : box.top + box.height, box.left : box.left + box.width]
    noise = generator.standard_normal(place.shape, dtype=np.float32)
    noise *= 255 * np.array(IMAGENET_STD, dtype=np.float32)[:, None, None]
    noise += 255 * np.array(IMAGENET_MEAN, dtype=np.float32)[:, None, None]
    place[...] = np.clip(np.rint(noise, out=noise), 0, 255, out=noise).astype(np.uint8)
