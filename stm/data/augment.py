"""Augmentation of a training clip's pixels but not its guides: RandAugment and random erasing, the same for all frames."""

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

# The fill colour of rotated and translated images: timm's plain grey, as in VideoMAE.
GREY = (128, 128, 128)

# Random erasing: minimum and maximum fraction of the image area and aspect ratio (height / width), as in VideoMAE and timm.
ERASED_AREA = (0.02, 1 / 3)
ERASED_ASPECT = (0.3, 1 / 0.3)
# Boxes that do not fit are sampled again. VideoMAE tries 100 times per clip, timm 10 times per image.
TRIES = 100


class RandAugment:
    """timm's RandAugment, sampled once per clip.

    VideoMAE applies it to whole frames before cropping; here it follows crop and flip, where it is cheaper.
    """

    def __init__(self, policy: str, size: int) -> None:
        """
        Args:
            policy: timm's description, such as "rand-m7-n4-mstd0.5-inc1".
            size: side of the images, in pixels.

        Raises:
            ValueError: timm does not understand the policy.
        """
        from timm.data.auto_augment import rand_augment_transform  # importing it takes seconds, and few runs need it

        # The largest translation in VideoMAE and timm is 0.45 of the image.
        settings = {"translate_const": int(0.45 * size), "img_mean": GREY, "interpolation": Image.Resampling.BICUBIC}
        try:
            self._transform = rand_augment_transform(policy, settings)
        except (AssertionError, KeyError, ValueError, TypeError) as error:
            raise ValueError(
                f"augmentation.auto_augment: {policy!r} is not a policy of timm's RandAugment ({error}); "
                "an example: rand-m7-n4-mstd0.5-inc1"
            ) from error

    def draw(self, generator: np.random.Generator) -> Callable[[NDArray[np.uint8]], NDArray[np.uint8]]:
        """Sample a transform for images uint8 [size, size, 3]; it is identical for all images that it is applied to."""
        return partial(self.apply, seed=int(generator.integers(2**32)))

    def apply(self, image: NDArray[np.uint8], seed: int) -> NDArray[np.uint8]:
        """Transform an image with the operations and magnitudes determined by `seed`."""
        # timm samples anew in each call from global generators; seeding them gives all frames of a clip the same transform.
        with global_seed(seed):
            return np.asarray(self._transform(Image.fromarray(image)))


@contextmanager
def global_seed(seed: int) -> Iterator[None]:
    """Seed Python's and numpy's global generators, and restore their states afterwards."""
    before, numpy_before = random.getstate(), np.random.get_state()  # noqa: NPY002  timm samples from this one
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(before)
        np.random.set_state(numpy_before)  # noqa: NPY002


def draw_erased(generator: np.random.Generator, probability: float, size: int) -> Box | None:
    """The box to erase from images of `size` x `size` pixels, or None: uniform area and position, log-uniform aspect ratio."""
    if generator.random() >= probability:
        return None
    for _ in range(TRIES):
        area = generator.uniform(*ERASED_AREA) * size * size
        # Log-uniform, so that tall and wide boxes are equally likely.
        aspect = math.exp(generator.uniform(math.log(ERASED_ASPECT[0]), math.log(ERASED_ASPECT[1])))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < height < size and 0 < width < size:
            top, left = (int(generator.integers(size - side + 1)) for side in (height, width))
            return Box(left, top, width, height)
    return None


def erase(generator: np.random.Generator, video: NDArray[np.uint8], box: Box) -> None:
    """Fill a box in all frames of a video uint8 [T, 3, S, S] in place with noise, independent per pixel, channel and frame.

    The noise is that of timm's mode `pixel`: standard normal after normalisation with ImageNet's mean and standard
    deviation. The pixels here are still bytes, so the noise is converted to bytes and clipped at black and white, which are
    1.8 to 2.6 standard deviations from the mean.
    """
    place = video[:, :, box.top : box.top + box.height, box.left : box.left + box.width]
    noise = generator.standard_normal(place.shape, dtype=np.float32)
    noise *= 255 * np.array(IMAGENET_STD, dtype=np.float32)[:, None, None]
    noise += 255 * np.array(IMAGENET_MEAN, dtype=np.float32)[:, None, None]
    place[...] = np.clip(np.rint(noise, out=noise), 0, 255, out=noise).astype(np.uint8)
