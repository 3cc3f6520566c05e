"""Clips as training samples: one seed per sample determines its frames, crop, flip, augmentation and guides.

A sample is a function of (seed, epoch, key, repeat) alone, regardless of the loading order, the number of worker
processes and the other clips. So a resumed run sees what an uninterrupted one would have seen.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from stm.config import Augmentation, CaptionChoice
from stm.data.augment import RandAugment, draw_erased, erase
from stm.data.crop_boxes import draw_crop, side_crops, whole_frame
from stm.data.crop_pixels import Decoded, FrameTransform, copy_clip, cut_clip, cut_frames
from stm.data.geometry import Geometry
from stm.data.guides.window import COMPUTED, Maps, cut_maps, read_maps
from stm.data.sampling import choose_captions, sample_window, view_windows
from stm.shards.index import Clip, ClipIndex
from stm.shards.reader import ShardReader
from stm.shards.schema import PackedArray, guide_arrays

__all__ = ["ClipDataset", "Sample", "cut_frames", "make_generator"]

Sample = dict[str, Any]

ALL_CAPTIONS = CaptionChoice()

_PACK_IT = "pack it (config: pack) or choose a masking strategy that does not need it"


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


class ClipDataset(Dataset[list[Sample]]):
    """The clips of a set of shards as samples of a given geometry.

    An item is a list of samples of one clip: `repeats` augmented samples in training, views x crops otherwise. A sample is a
    dict: "video" uint8 [T, 3, S, S], "guides" {"noise": float32 [slots, N], ...}, "label" int (-1: none), "key", "caption"
    ("": none), "caption_index" (index into the clip's packed captions, -1: none), "text" float32 [D] with the option
    `text` (zeros: none), "clip" (index into the dataset) and "view" (the repeat, or temporal view x crops + crop). Without
    `resize`, it contains "crop" uint8 [T, height, width, 3], "flip", "image_size" (S) and "interpolation" instead of "video".
    """

    def __init__(
        self,
        indexes: Sequence[Path],
        geometry: Geometry,
        augmentation: Augmentation,
        seed: int,
        train: bool,
        views: int = 1,
        repeats: int = 1,
        *,
        guides: Sequence[str] | None = None,
        classes: Sequence[str] | None = None,
        text: bool = False,
        captions: CaptionChoice = ALL_CAPTIONS,
        crops: int = 1,
        whole: bool = False,
        kept_gigabytes: float = 0.0,
        resize: bool = True,
    ) -> None:
        """
        Args:
            indexes: shard indexes (Parquet), each next to its tar.
            augmentation: used if `train`; otherwise only its interpolation: `crops` and `whole` determine the crops, and
                nothing is flipped.
            train: sample windows and crops at random; otherwise spread them evenly.
            views: temporal views per clip if not `train`.
            repeats: augmented samples per clip if `train`. They share the decoded frames.
            guides: maps to read in addition to the noise, such as a masking strategy's `needs`; those that the method
                computes itself are ignored. None: all maps that every clip has.
            classes: labels in the order of their class indices; None: this dataset's own, sorted. Pass the training set's
                `classes` to the test set.
            text: whether to read the text vector of the sampled caption.
            captions: which captions to sample from.
            crops: square crops per temporal view if not `train`: 1 or 3.
            whole: whether to squash the whole frame to a square instead, if not `train`.
            kept_gigabytes: memory for decoded frames in each loading process; see `ShardReader`.
            resize: whether to resize crops to `image_size` and mirror them here, or leave that to `stm.data.resizing`.

        Raises:
            ValueError: a shard cannot be used, a clip lacks a map in `guides` or its captions' vectors, a source has
                no captions, or the augmentation operates on resized pixels and `resize` is off.
        """
        if train and not resize and (late := augmentation.after_resizing):
            raise ValueError(
                f"augmentation: {' and '.join(late)} operate on resized pixels, but resizing is done on the device"
            )
        self.index = ClipIndex(indexes)
        self.geometry = geometry
        self.augmentation = augmentation
        self.seed = seed
        self.train = train
        self.views = views
        self.repeats = repeats
        self.crops = crops
        self.whole = whole
        self.resize = resize
        self.epoch = 0
        self.captions = self._check_choice(captions)
        self.guides = self._choose_guides(guides)
        self.text_width = self._check_text() if text else None
        labels = sorted({label for label in self.index.labels() if label is not None})
        self.classes = labels if classes is None else list(classes)
        self._numbers = {label: number for number, label in enumerate(self.classes)}
        self._reader = ShardReader(kept_gigabytes)
        policy = augmentation.auto_augment if train else None
        self._rand_augment = None if policy is None else RandAugment(policy, geometry.image_size)

    def _check_choice(self, choice: CaptionChoice) -> CaptionChoice:
        packed = self.index.sources()
        missing = [source for source in choice.sources or () if source not in packed]
        if missing:
            raise ValueError(
                f"captions.sources: no clip has captions of {', '.join(missing)}; packed sources: "
                f"{', '.join(packed) or 'none that name their source'} (config: pack.captions)"
            )
        return choice

    def _choose_guides(self, requested: Sequence[str] | None) -> tuple[str, ...]:
        arrays = guide_arrays()
        if requested is None:
            return tuple(guide for guide, array in arrays.items() if not len(self._lacking(array)))
        chosen = tuple(guide for guide in requested if guide not in COMPUTED)
        for guide in chosen:
            if guide in arrays:
                self._check_array(arrays[guide])
            else:
                self._refuse(np.arange(len(self.index)), f"have no {guide} map", _PACK_IT)
        return chosen

    def _lacking(self, array: PackedArray) -> NDArray[np.int64]:
        """Indices of the clips that lack an array or, for per-caption maps, a caption from the chosen sources."""
        lacking = self.index.lacking(array.name)
        if not array.per_source:
            return lacking
        without_captions = np.flatnonzero(self.index.count_captions(self.captions.sources) == 0)
        return np.union1d(lacking, without_captions)

    def _check_array(self, array: PackedArray) -> None:
        """Reject an array that some clips lack, or whose layers differ in shape between clips and so cannot be batched."""
        sources = self.captions.sources
        of = f" of a caption from {', '.join(sources)}" if array.per_source and sources else ""
        self._refuse(self._lacking(array), f"have no {array.name} map{of}", _PACK_IT)
        for column in array.size_columns:
            if len(values := self.index.values(column)) > 1:
                what = column.removeprefix(f"{array.name}_")
                raise ValueError(
                    f"the shards' {array.name} maps have {values} {what}: pack them all with the same {array.name}.{what}"
                )

    def _check_text(self) -> int:
        """The dimension of the captions' text vectors."""
        captioned = np.flatnonzero(self.index.count_captions())
        advice = "pack them (config: pack.text) or leave out what needs them: contrast, zero_shot, retrieval"
        self._refuse(np.intersect1d(self.index.lacking("text"), captioned), "have captions without vectors", advice)
        widths = self.index.values("text_width")
        if len(widths) != 1:
            problem = f"vectors of widths {widths}: pack all shards with one text encoder" if widths else "no captions"
            raise ValueError(f"the shards have {problem}, but caption vectors are required")
        return widths[0]

    def _refuse(self, clips: NDArray[np.int64], what: str, advice: str) -> None:
        if len(clips):
            clip = self.index[int(clips[0])]
            example = f"such as {clip.key!r} in {clip.tar}"
            raise ValueError(f"{len(clips)} of {len(self.index)} clips {what}, {example}; {advice}")

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of `dataset[i]`. Loaders index with (epoch, i) instead, so that worker processes get the epoch, too."""
        self.epoch = epoch

    def __len__(self) -> int:
        """The number of clips."""
        return len(self.index)

    @property
    def samples_per_clip(self) -> int:
        return self.repeats if self.train else self.views * self.crops

    def labels(self) -> NDArray[np.int64]:
        """Class indices of all clips, int64 [clips]; -1: no label, or one that is not in `classes`."""
        return np.array([self._number(label) for label in self.index.labels()], dtype=np.int64)

    def _number(self, label: str | None) -> int:
        return -1 if label is None else self._numbers.get(label, -1)

    def caption_numbers(self, number: int) -> list[int]:
        """Indices of the clip's packed captions that may be sampled, ascending."""
        return self._caption_numbers(self.index[number])

    def _caption_numbers(self, clip: Clip) -> list[int]:
        return choose_captions(len(clip.captions), clip.sources, self.captions)

    def texts(self, number: int) -> NDArray[np.float32]:
        """Unit text vectors of the captions in `caption_numbers`, float32 [captions, D]; for a dataset with `text`."""
        return self._texts(self.index[number], self.caption_numbers(number))

    def _texts(self, clip: Clip, captions: list[int]) -> NDArray[np.float32]:
        if not captions:
            return np.zeros((0, self.text_width or 0), dtype=np.float32)
        return self._reader.text(clip, captions)

    def __getitem__(self, item: int | tuple[int, int]) -> list[Sample]:
        """All samples of a clip: `dataset[i]` in the current epoch, `dataset[epoch, i]` in a given one."""
        epoch, number = item if isinstance(item, tuple) else (self.epoch, item)
        clip = self.index[number]
        each = self.repeats if self.train else self.crops
        recipes = [
            self._make_recipe(clip, window, maps, crop, make_generator(self.seed, epoch, clip.key, view * each + crop))
            for view, window in enumerate(self._windows(clip, epoch))
            for maps in [read_maps(self._reader, clip, self.guides, window, self.geometry)]
            for crop in range(each)
        ]
        frames = self._reader.frames(clip, np.concatenate([recipe.window for recipe in recipes]).tolist())
        pixels = self._cut(frames, recipes)
        return [
            {**own, **recipe.sample, "clip": number, "view": view}
            for view, (own, recipe) in enumerate(zip(pixels, recipes, strict=True))
        ]

    def _cut(self, frames: Decoded, recipes: list["SampleRecipe"]) -> list[Sample]:
        """Each sample's pixels: the resized video, or the crop together with the arguments for resizing it later."""
        windows, cuts, size = (
            [recipe.window for recipe in recipes],
            [recipe.cut for recipe in recipes],
            self.geometry.image_size,
        )
        if not self.resize:
            crops = copy_clip(frames, windows, cuts)
            rest = {"image_size": size, "interpolation": self.augmentation.interpolation}
            return [{"crop": crop, "flip": cut.flip, **rest} for crop, cut in zip(crops, cuts, strict=True)]
        videos = cut_clip(frames, windows, cuts, size)
        for video, recipe in zip(videos, recipes, strict=True):
            self._erase(video, recipe.generator)
        return [{"video": video} for video in videos]

    def _windows(self, clip: Clip, epoch: int) -> list[NDArray[np.int64]]:
        g = self.geometry
        if not self.train:
            return view_windows(self.views, g.frames, g.stride, clip.frames, g.sampling)
        # One window for all repeats: reading and decoding frames is the expensive part (repeated augmentation).
        generator = make_generator(self.seed, epoch, clip.key, -1)
        return [sample_window(generator, g.frames, g.stride, clip.frames, g.sampling)]

    def _make_recipe(
        self, clip: Clip, window: NDArray[np.int64], maps: Maps, crop: int, generator: np.random.Generator
    ) -> "SampleRecipe":
        """Draw all random numbers of a sample in a fixed order; an option that is off draws none."""
        if self.train:
            box, flip = draw_crop(generator, self.augmentation, clip.width, clip.height)
        elif self.whole:
            box, flip = whole_frame(clip.width, clip.height), False
        else:
            box, flip = side_crops(self.crops, clip.width, clip.height)[crop], False
        numbers = self._caption_numbers(clip)
        caption = numbers[int(generator.integers(len(numbers)))] if numbers else -1
        # One value per token, whether or not the strategy uses it: runs that differ only in the mask see the same pixels.
        noise = generator.random((self.geometry.slots, self.geometry.tokens), dtype=np.float32)
        change = None if self._rand_augment is None else self._rand_augment.draw(generator)
        if numbers:
            # A caption's maps can only be read once it has been sampled; all other maps are shared by the clip's samples.
            maps = {**maps, **read_maps(self._reader, clip, self.guides, window, self.geometry, caption)}
        sample = {
            "guides": {"noise": noise, **cut_maps(maps, clip, box, flip, self.geometry)},
            "label": self._number(clip.label),
            "key": clip.key,
            "caption": clip.captions[caption] if numbers else "",
            "caption_index": caption,
        }
        if self.text_width is not None:
            none = np.zeros(self.text_width, dtype=np.float32)
            sample["text"] = self._texts(clip, [caption])[0] if numbers else none
        cut = FrameTransform(box, flip, change, self.augmentation.interpolation)
        return SampleRecipe(window, cut, sample, generator)

    def _erase(self, video: NDArray[np.uint8], generator: np.random.Generator) -> None:
        if self.train and self.augmentation.erasing > 0:
            box = draw_erased(generator, self.augmentation.erasing, self.geometry.image_size)
            if box is not None:
                erase(generator, video, box)
