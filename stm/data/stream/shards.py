"""From a tar, which is read from start to end, to the samples of its clips."""

import random
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import webdataset

from stm.data.crop_pixels import Allocate, allocate_pixels
from stm.data.dataset import ClipDataset, Sample
from stm.shards.index import Clip
from stm.shards.reader import ShardReader
from stm.shards.schema import guide_arrays
from stm.storage.remote import Access, open_url, show_url
from stm.storage.tables import REMOVE, DamagedError


class Urls(NamedTuple):
    """The places of shards and of their indexes, and the folder to which the indexes were fetched."""

    folder: str
    tars: Sequence[str]
    indexes: Sequence[str]


@contextmanager
def name_urls(urls: Urls) -> Iterator[None]:
    """A block whose errors about fetched indexes, and about the tars that would lie beside them, name URLs instead."""

    def show(match: re.Match[str]) -> str:
        return show_url((urls.tars if match[2] == "tar" else urls.indexes)[int(match[1])])

    try:
        yield
    except ValueError as error:
        message = re.sub(rf"{re.escape(urls.folder)}/(\d+)\.(tar|parquet)", show, str(error))
        message = message.replace(REMOVE, "copy it again")
        raise (DamagedError if isinstance(error, DamagedError) else ValueError)(message) from error.__cause__


class _StreamedMembers(ShardReader):
    """Reads the members of one clip, which were taken from the stream before."""

    def __init__(self) -> None:
        super().__init__()
        self._start = 0
        self._data = b""

    def hold(self, members: Mapping[int, bytes]) -> None:
        """Take a clip's members, by their offset in the tar."""
        pieces: list[bytes] = []
        self._start = position = min(members)
        for offset, data in sorted(members.items()):
            # The space between members, so that neighbours can be read together as from a tar.
            pieces += [bytes(offset - position), data]
            position = offset + len(data)
        self._data = b"".join(pieces)

    def _read(self, clip: Clip, offset: int, size: int) -> bytes:
        start = offset - self._start
        return self._data[start : start + size]


class StreamedShards:
    """The shards of a stream, and how their clips become samples."""

    def __init__(
        self,
        urls: Urls,
        access: Access,
        dataset: ClipDataset,
        buffer: int,
    ) -> None:
        self.dataset = dataset
        self.sizes: list[int] = dataset.index.count_clips().tolist()
        self.starts = np.concatenate([[0], np.cumsum(self.sizes)]).tolist()  # each shard's first clip
        self._urls = urls
        self._access = access
        self._buffer = buffer
        self._reader = _StreamedMembers()
        arrays = {guide_arrays()[guide].name for guide in dataset.guides}
        self._arrays = arrays | {"text"} if dataset.text_width is not None else arrays

    def samples(
        self, shards: Sequence[int], epoch: int, allocate: Allocate = allocate_pixels
    ) -> Iterator[list[Sample]]:
        """The samples of each clip of the given shards; with `train`, in a shuffled order.

        Args:
            allocate: memory for the pixels of a clip's samples.
        """
        clips = (clip for shard in shards for clip in self._clips(shard, epoch))
        if self.dataset.train:
            rng = random.Random(f"{self.dataset.seed}/{epoch}/{shards}")
            clips = webdataset.shuffle(self._buffer, initial=self._buffer, rng=rng)(clips)
        for number, members in clips:
            with name_urls(self._urls):
                self._reader.hold(members)
                samples = self.dataset.samples.make(self.dataset.index[number], self._reader, epoch, allocate)
            yield [{**sample, "clip": number} for sample in samples]

    def _clips(self, shard: int, epoch: int) -> Iterator[tuple[int, dict[int, bytes]]]:
        """Each clip's index in the dataset, and the members that its samples need, by offset, in the order of the tar.

        Raises:
            DamagedError: the tar is damaged, or does not contain the clips of the index.
        """
        shown = show_url(self._urls.tars[shard])
        numbers = range(self.starts[shard], self.starts[shard + 1])
        places = {clip.key: self._places(clip, epoch) for clip in map(self.dataset.index.__getitem__, numbers)}
        with open_url(self._urls.tars[shard], self._access) as stream:
            samples = _split(stream, shown, places)
            previous = ""
            for number, (key, needed) in zip(numbers, places.items(), strict=True):
                members = _next(samples, shown, previous)
                if members is None or members["__key__"] != key:
                    found = "the tar ends" if members is None else f"there is clip {members['__key__']!r}"
                    raise DamagedError(
                        f"{shown}: {found}{_after(previous)}, where its index has clip {key!r}: the tar is truncated or "
                        "damaged, or that of another index; copy both again"
                    )
                yield number, {needed[name][0]: _pick(members, key, name, needed[name][1], shown) for name in needed}
                previous = key

    def _places(self, clip: Clip, epoch: int) -> dict[str, tuple[int, int]]:
        """Offset and size of each member that the samples of a clip need, by suffix."""
        frames = np.unique(np.concatenate(self.dataset.samples.windows(clip, epoch))).tolist()
        places = {f"{n:04d}.jpg": (int(clip.offsets[n]), int(clip.sizes[n])) for n in frames}
        return places | {f"{name}.npy": place for name, place in clip.arrays.items() if name in self._arrays}


def _split(stream: Any, shown: str, places: Mapping[str, Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """The clips of a tar: those of their members that are in `places`, by suffix, and `__key__`."""

    def needed(name: str) -> bool:
        key, _, suffix = name.partition(".")
        return key not in places or suffix in places[key]

    files = webdataset.tariterators.tar_file_expander([{"url": shown, "stream": stream}], select_files=needed)
    samples: Iterator[dict[str, Any]] = webdataset.tariterators.group_by_keys(files)
    return samples


def _next(samples: Iterator[dict[str, Any]], shown: str, previous: str) -> dict[str, Any] | None:
    try:
        return next(samples, None)
    except (tarfile.TarError, EOFError, ValueError) as error:
        reason = str(error.args[0]).partition(" @ ")[0]  # webdataset adds the stream
        raise DamagedError(f"{shown}: not a tar that can be read{_after(previous)} ({reason}); copy it again") from None


def _after(previous: str) -> str:
    return f" after clip {previous!r}" if previous else ""


def _pick(members: Mapping[str, bytes], key: str, suffix: str, size: int, shown: str) -> bytes:
    data = members.get(suffix)
    if data is None or len(data) != size:
        found = "is missing" if data is None else f"has {len(data)} bytes, and {size} in the index"
        raise DamagedError(f"{shown}: {key}.{suffix} {found}: the tar is damaged, or that of another index")
    return data
