"""One clip's members as training samples: one seed per sample determines its frames, crop, flip, augmentation and guides.

A sample is a function of (seed, epoch, key, repeat) alone, regardless of where the clip's bytes come from, of the loading
order, the number of worker processes and the other clips. So a resumed run sees what an uninterrupted one would have seen.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from stm.config import Augmentation, CaptionChoice
from stm.data.augment import RandAugment, draw_erased, erase
from stm.data.crop_boxes import draw_crop, side_crops, whole_frame
from stm.data.crop_pixels import Allocate, Decoded, FrameTransform, allocate_pixels, copy_clip, cut_clip
from stm.data.geometry import Geometry
from stm.data.guides.window import ArrayReader, Maps, cut_maps, read_maps
from stm.data.sampling import choose_captions, sample_window, view_windows
from stm.shards.index import Clip

Sample = dict[str, Any]

ALL_CAPTIONS = CaptionChoice()


class MemberReader(ArrayReader, Protocol):
    """Where a clip's members come from: a shard on disk (`stm.shards.reader.ShardReader`), or bytes that were received."""

    def frames(self, clip: Clip, positions: Iterable[int]) -> Decoded:
        """Yield each distinct position, ascending, with its frame, valid until the next one."""
        ...

    def jpegs(self, clip: Clip, positions: Iterable[int]) -> dict[int, memoryview]:
        """The JPEG of each distinct position, ascending."""
        ...

    def text(self, clip: Clip, captions: Sequence[int]) -> NDArray[np.float32]:
        """The unit text vectors of the given captions, float32 [captions, D]."""
        ...


def make_generator(seed: int, epoch: int, key: str, repeat: int) -> np.random.Generator:
    """The random number generator of one sample."""
    # A hash, not a sum: similar keys and adjacent epochs must yield unrelated random numbers.
    digest = hashlib.blake2b(f"{seed}/{epoch}/{repeat}/{key}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest, "big")))


class SampleRecipe(NamedTuple):
    """Everything that defines a sample, before its pixels are decoded."""

    window: NDArray[np.int64]
    cut: FrameTransform
    sample: Sample  # everything except the video
    generator: np.random.Generator  # for everything sampled after the crop


@dataclass(frozen=True)
class SampleMaker:
    """How clips become samples. `make` is all that a source of clips needs; `ClipDataset` describes the samples."""

    geometry: Geometry
    augmentation: Augmentation
    seed: int
    train: bool
    views: int = 1  # temporal views if not `train`
    repeats: int = 1  # augmented samples if `train`
    crops: int = 1  # square crops per temporal view if not `train`
    whole: bool = False  # squash the whole frame if not `train`
    guides: tuple[str, ...] = ()  # maps to read, see `stm.data.guides.window.read_maps`
    captions: CaptionChoice = ALL_CAPTIONS
    text_width: int | None = None  # dimension of the captions' vectors; None: do not read them
    numbers: Mapping[str, int] = field(default_factory=dict)  # label -> class index
    decode: bool = True  # False: leave decoding, cropping and resizing to the device
    resize: bool = True  # False: leave resizing to the device
    rand_augment: RandAugment | None = None

    @property
    def samples_per_clip(self) -> int:
        return self.repeats if self.train else self.views * self.crops

    def make(self, clip: Clip, reader: MemberReader, epoch: int, allocate: Allocate = allocate_pixels) -> list[Sample]:
        """All samples of a clip in an epoch, in the order of their views, without "clip".

        All of a clip's frames are decoded once, however many samples show them.

        Args:
            clip: its frames, sizes, captions and label.
            reader: reads its members.
            allocate: memory for the videos of all its samples.

        Raises:
            ValueError: a member is damaged.
        """
        each = self.repeats if self.train else self.crops
        recipes = [
            self._make_recipe(clip, reader, window, maps, crop, view * each + crop, epoch)
            for view, window in enumerate(self.windows(clip, epoch))
            for maps in [read_maps(reader, clip, self.guides, window, self.geometry)]
            for crop in range(each)
        ]
        pixels = self._make_pixels(clip, reader, recipes, allocate)
        return [
            {**own, **recipe.sample, "view": view}
            for view, (own, recipe) in enumerate(zip(pixels, recipes, strict=True))
        ]

    def windows(self, clip: Clip, epoch: int) -> list[NDArray[np.int64]]:
        """The positions of the frames of each temporal view, int64 [T] each, ascending; one window if `train`."""
        g = self.geometry
        if not self.train:
            return view_windows(self.views, g.frames, g.stride, clip.frames, g.sampling)
        # One window for all repeats: reading and decoding frames is the expensive part (repeated augmentation).
        generator = make_generator(self.seed, epoch, clip.key, -1)
        return [sample_window(generator, g.frames, g.stride, clip.frames, g.sampling)]

    def caption_numbers(self, clip: Clip) -> list[int]:
        """Indices of the clip's packed captions that may be sampled, ascending."""
        return choose_captions(len(clip.captions), clip.sources, self.captions)

    def number(self, label: str | None) -> int:
        """The class index of a label; -1: no label, or one that is not among the classes."""
        return -1 if label is None else self.numbers.get(label, -1)

    def _make_recipe(
        self,
        clip: Clip,
        reader: MemberReader,
        window: NDArray[np.int64],
        maps: Maps,
        crop: int,
        view: int,
        epoch: int,
    ) -> SampleRecipe:
        """Draw all random numbers of a sample in a fixed order; an option that is off draws none."""
        generator = make_generator(self.seed, epoch, clip.key, view)
        if self.train:
            box, flip = draw_crop(generator, self.augmentation, clip.width, clip.height)
        elif self.whole:
            box, flip = whole_frame(clip.width, clip.height), False
        else:
            box, flip = side_crops(self.crops, clip.width, clip.height)[crop], False
        numbers = self.caption_numbers(clip)
        caption = numbers[int(generator.integers(len(numbers)))] if numbers else -1
        # One value per token, whether or not the strategy uses it: runs that differ only in the mask see the same pixels.
        noise = generator.random((self.geometry.slots, self.geometry.tokens), dtype=np.float32)
        change = None if self.rand_augment is None else self.rand_augment.draw(generator)
        if numbers:
            # A caption's maps can only be read once it has been sampled; all other maps are shared by the clip's samples.
            maps = {**maps, **read_maps(reader, clip, self.guides, window, self.geometry, caption)}
        sample = {
            "guides": {"noise": noise, **cut_maps(maps, clip, box, flip, self.geometry)},
            "label": self.number(clip.label),
            "key": clip.key,
            "caption": clip.captions[caption] if numbers else "",
            "caption_index": caption,
        }
        if self.text_width is not None:
            none = np.zeros(self.text_width, dtype=np.float32)
            sample["text"] = reader.text(clip, [caption])[0] if numbers else none
        cut = FrameTransform(box, flip, change, self.augmentation.interpolation)
        return SampleRecipe(window, cut, sample, generator)

    def _make_pixels(
        self, clip: Clip, reader: MemberReader, recipes: list[SampleRecipe], allocate: Allocate
    ) -> list[Sample]:
        """Each sample's pixels: the resized video; or the crop or the JPEGs, with the arguments for finishing it later."""
        size = self.geometry.image_size
        windows, cuts = [recipe.window for recipe in recipes], [recipe.cut for recipe in recipes]
        rest = {"image_size": size, "interpolation": self.augmentation.interpolation}
        positions = np.unique(np.concatenate(windows)).tolist()
        if not self.decode:
            jpegs = list(reader.jpegs(clip, positions).values())
            frame = (clip.height, clip.width)
            return [
                {
                    "jpegs": jpegs,
                    "frames": np.searchsorted(positions, window).tolist(),
                    "frame_size": frame,
                    "box": cut.box,
                    "flip": cut.flip,
                    **rest,
                }
                for window, cut in zip(windows, cuts, strict=True)
            ]
        frames = reader.frames(clip, positions)
        if not self.resize:
            crops = copy_clip(frames, windows, cuts)
            return [{"crop": crop, "flip": cut.flip, **rest} for crop, cut in zip(crops, cuts, strict=True)]
        videos = allocate((len(windows), self.geometry.frames, 3, size, size))
        cut_clip(frames, windows, cuts, videos)
        for video, recipe in zip(videos, recipes, strict=True):
            self._erase(video, recipe.generator)
        return [{"video": video} for video in videos]

    def _erase(self, video: NDArray[np.uint8], generator: np.random.Generator) -> None:
        if self.train and self.augmentation.erasing > 0:
            box = draw_erased(generator, self.augmentation.erasing, self.geometry.image_size)
            if box is not None:
                erase(generator, video, box)
