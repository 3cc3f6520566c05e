"""The clips of a set of shards as training samples; `stm.data.samples` makes the samples of one clip."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from stm.config import Augmentation, CaptionChoice
from stm.data.augment import RandAugment
from stm.data.crop_pixels import Allocate, allocate_pixels, cut_frames
from stm.data.geometry import Geometry
from stm.data.guides.window import COMPUTED
from stm.data.samples import ALL_CAPTIONS, Sample, SampleMaker, make_generator
from stm.shards.index import ClipIndex
from stm.shards.reader import ShardReader
from stm.shards.schema import PackedArray, guide_arrays

__all__ = ["ClipDataset", "Sample", "cut_frames", "make_generator"]

_PACK_IT = (
    "pack it (config: pack; `pack.more_splits` for a split that no run trains on) or choose a masking strategy that does not "
    "need it"
)


class ClipDataset(Dataset[list[Sample]]):
    """The clips of a set of shards as samples of a given geometry.

    An item is a list of samples of one clip: `repeats` augmented samples in training, views x crops otherwise. A sample is a
    dict: "video" uint8 [T, 3, S, S], "guides" {"noise": float32 [slots, N], ...}, "label" int (-1: none), "key", "caption"
    ("": none), "caption_index" (index into the clip's packed captions, -1: none), "text" float32 [D] with the option
    `text` (zeros: none), "clip" (index into the dataset) and "view" (the repeat, or temporal view x crops + crop). Without
    `resize`, it contains "crop" uint8 [T, height, width, 3], "flip", "image_size" (S) and "interpolation" instead of "video";
    without `decode`, "jpegs" (those of the clip's frames, of all its samples together), "frames" (the index of each of the
    sample's T frames among them), "frame_size" (height and width) and "box" instead of "crop".
    """

    def __init__(
        self,
        indexes: Sequence[Path] | ClipIndex,
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
        decode: bool = True,
    ) -> None:
        """
        Args:
            indexes: shard indexes (Parquet), each next to its tar; or the index read from them.
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
            decode: whether to decode frames here, or leave that, cropping and resizing to `stm.data.decoding`.

        Raises:
            ValueError: a shard cannot be used, a clip lacks a map in `guides` or its captions' vectors, a source has
                no captions, or the augmentation operates on resized pixels and `resize` or `decode` is off.
        """
        if train and not (resize and decode) and (late := augmentation.after_resizing):
            raise ValueError(
                f"augmentation: {' and '.join(late)} operate on resized pixels, but resizing is done on the device"
            )
        self.index = indexes if isinstance(indexes, ClipIndex) else ClipIndex(indexes)
        self.geometry = geometry
        self.augmentation = augmentation
        self.seed = seed
        self.train = train
        self.views = views
        self.repeats = repeats
        self.crops = crops
        self.whole = whole
        self.epoch = 0
        self.captions = self._check_choice(captions)
        self.guides = self._choose_guides(guides)
        self.text_width = self._check_text() if text else None
        labels = sorted({label for label in self.index.labels() if label is not None})
        self.classes = labels if classes is None else list(classes)
        policy = augmentation.auto_augment if train else None
        self.samples = SampleMaker(
            geometry,
            augmentation,
            seed,
            train,
            views,
            repeats,
            crops,
            whole,
            self.guides,
            self.captions,
            self.text_width,
            {label: number for number, label in enumerate(self.classes)},
            decode,
            resize,
            None if policy is None else RandAugment(policy, geometry.image_size),
        )
        self._reader = ShardReader(kept_gigabytes)
        self.allocate: Allocate = allocate_pixels  # a loader gives memory that its processes share

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
        return self.samples.samples_per_clip

    def labels(self) -> NDArray[np.int64]:
        """Class indices of all clips, int64 [clips]; -1: no label, or one that is not in `classes`."""
        return np.array([self.samples.number(label) for label in self.index.labels()], dtype=np.int64)

    def caption_numbers(self, number: int) -> list[int]:
        """Indices of the clip's packed captions that may be sampled, ascending."""
        return self.samples.caption_numbers(self.index[number])

    def texts(self, number: int) -> NDArray[np.float32]:
        """Unit text vectors of the captions in `caption_numbers`, float32 [captions, D]; for a dataset with `text`."""
        clip = self.index[number]
        captions = self.samples.caption_numbers(clip)
        if not captions:
            return np.zeros((0, self.text_width or 0), dtype=np.float32)
        return self._reader.text(clip, captions)

    def __getitem__(self, item: int | tuple[int, int]) -> list[Sample]:
        """All samples of a clip: `dataset[i]` in the current epoch, `dataset[epoch, i]` in a given one."""
        epoch, number = item if isinstance(item, tuple) else (self.epoch, item)
        samples = self.samples.make(self.index[number], self._reader, epoch, self.allocate)
        return [{**sample, "clip": number} for sample in samples]
