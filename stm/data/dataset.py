"""Clips as training samples: frames, crop, flip and guides from one seed a sample.

What a sample looks like depends on (seed, epoch, key, repeat) alone: not on the order of loading, the number
of worker processes or the other clips. So a resumed run sees what an uninterrupted one would have seen.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from stm.config import Augmentation
from stm.data.crops import Box, center_crop, draw_crop
from stm.data.geometry import Geometry
from stm.data.guides import crop_map, motion_between, pool_slots
from stm.data.index import GUIDES, Clip, ClipIndex
from stm.data.reader import ShardReader
from stm.data.sampling import sample_window, view_windows

Sample = dict[str, Any]


def make_generator(seed: int, epoch: int, key: str, repeat: int) -> np.random.Generator:
    """The source of all randomness of one sample."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{repeat}/{key}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest, "big")))


class ClipDataset(Dataset[list[Sample]]):
    """Clips of some shards, cut to a geometry.

    An item is a list of samples of one clip: `repeats` augmented samples in training, one a temporal view
    otherwise. A sample is a dict of numpy arrays: "video" uint8 [T, 3, S, S], "guides" {"noise": float32
    [slots, N], ...}, "label" int (-1: none), "key", "caption" ("": none), "clip" (its number in the data set)
    and "view" (number of the repeat or view).
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
    ) -> None:
        """
        Args:
            indexes: shard indexes (Parquet), each with its tar beside it.
            augmentation: used when `train`; otherwise the crop is the central square and nothing is flipped.
            train: random windows and crops, or evenly spread windows and central crops.
            views: temporal views of a clip when not `train`.
            repeats: augmented samples of a clip when `train`. They share the frames that were read.
            guides: maps to read beside the noise, such as a masking strategy's `needs`. None: all that each
                clip has.
            classes: labels in the order of their numbers; None: this data set's own, sorted. Pass the
                training set's `classes` to the test set's.

        Raises:
            ValueError: a shard cannot be used, or a clip lacks a map in `guides`.
        """
        self.index = ClipIndex(indexes)
        self.geometry, self.augmentation, self.seed, self.train = geometry, augmentation, seed, train
        self.views, self.repeats, self.epoch = views, repeats, 0
        self.guides = self._choose_guides(guides)
        found = sorted({label for label in self.index.labels() if label is not None})
        self.classes = found if classes is None else list(classes)
        self._numbers = {label: number for number, label in enumerate(self.classes)}
        self._reader = ShardReader()

    def _choose_guides(self, wanted: Sequence[str] | None) -> tuple[str, ...]:
        if wanted is None:
            return tuple(guide for guide in GUIDES if not len(self.index.lacking(guide)))
        for guide in wanted:
            missing = self.index.lacking(guide)
            if len(missing):
                clip = self.index[int(missing[0])]
                raise ValueError(
                    f"{len(missing)} of {len(self.index)} clips have no {guide} map, such as {clip.key!r} in "
                    f"{clip.tar}; pack it (config: pack) or choose a masking strategy that does without"
                )
        return tuple(wanted)

    def set_epoch(self, epoch: int) -> None:
        """The epoch of `dataset[i]`. Loaders ask for (epoch, i) instead, which reaches worker processes."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Clips."""
        return len(self.index)

    @property
    def samples_per_clip(self) -> int:
        return self.repeats if self.train else self.views

    def labels(self) -> NDArray[np.int64]:
        """Class numbers of all clips, int64 [clips]; -1: no label, or one that is not in `classes`."""
        return np.array([self._number(label) for label in self.index.labels()], dtype=np.int64)

    def _number(self, label: str | None) -> int:
        return -1 if label is None else self._numbers.get(label, -1)

    def __getitem__(self, item: int | tuple[int, int]) -> list[Sample]:
        """All samples of a clip: `dataset[i]` in the epoch that was set, `dataset[epoch, i]` in another."""
        epoch, number = item if isinstance(item, tuple) else (self.epoch, item)
        clip = self.index[number]
        windows = self._windows(clip, epoch)
        frames = self._reader.frames(clip, np.concatenate(windows).tolist())
        samples = []
        for repeat, window in enumerate(windows):
            generator = make_generator(self.seed, epoch, clip.key, repeat)
            sample = self._sample(clip, window, [frames[position] for position in window.tolist()], generator)
            samples.append({**sample, "clip": number, "view": repeat})
        return samples

    def _windows(self, clip: Clip, epoch: int) -> list[NDArray[np.int64]]:
        g = self.geometry
        if not self.train:
            return view_windows(self.views, g.frames, g.stride, clip.frames)
        # One window for all repeats: reading and decoding frames is what costs (repeated augmentation).
        generator = make_generator(self.seed, epoch, clip.key, -1)
        return [sample_window(generator, g.frames, g.stride, clip.frames)] * self.repeats

    def _sample(
        self,
        clip: Clip,
        window: NDArray[np.int64],
        frames: list[NDArray[np.uint8]],
        generator: np.random.Generator,
    ) -> Sample:
        box, flip = center_crop(clip.width, clip.height), False
        if self.train:
            box, flip = draw_crop(generator, self.augmentation, clip.width, clip.height)
        caption = int(generator.integers(len(clip.captions))) if clip.captions else -1
        noise = generator.random((self.geometry.slots, self.geometry.tokens), dtype=np.float32)
        return {
            "video": cut_frames(frames, box, self.geometry.image_size, flip),
            "guides": {"noise": noise, **self._read_guides(clip, window, caption, box, flip)},
            "label": self._number(clip.label),
            "key": clip.key,
            "caption": clip.captions[caption] if clip.captions else "",
        }

    def _read_guides(
        self, clip: Clip, window: NDArray[np.int64], caption: int, box: Box, flip: bool
    ) -> dict[str, NDArray[np.float32]]:
        """The maps of the taken frames, cut like the pixels, float32 [slots, N] each."""
        maps: dict[str, NDArray[np.floating]] = {}
        if "similarity" in self.guides:
            maps["similarity"] = self._reader.similarity(clip, caption, window.tolist())
        if "motion" in self.guides:
            first = max(0, int(window[0]) - self.geometry.stride + 1)
            magnitude = self._reader.motion(clip, first, int(window[-1]))[..., 0]
            maps["motion"] = motion_between(magnitude, window - first, self.geometry.stride)
        frame = (clip.width, clip.height)
        return {
            name: pool_slots(crop_map(values, frame, box, self.geometry.side, flip), self.geometry.tubelet)
            for name, values in maps.items()
        }


def cut_frames(frames: list[NDArray[np.uint8]], box: Box, size: int, flip: bool) -> NDArray[np.uint8]:
    """Crops frames [height, width, 3], resizes and mirrors them -> uint8 [T, 3, size, size]."""
    # Area averaging when it shrinks avoids aliasing; when it enlarges, it would be nearest neighbour.
    shrinks = box.width >= size and box.height >= size
    interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    video = np.empty((len(frames), 3, size, size), dtype=np.uint8)
    for number, frame in enumerate(frames):
        part = frame[box.top : box.top + box.height, box.left : box.left + box.width]
        resized = cv2.resize(part, (size, size), interpolation=interpolation)
        video[number] = (resized[:, ::-1] if flip else resized).transpose(2, 0, 1)
    return video
