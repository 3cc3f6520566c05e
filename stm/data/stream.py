"""Shards that are read from start to end, from URLs: for data that is not on a local disk.

Built on `webdataset`, which splits each tar into clips and shuffles them in a buffer. Each clip then becomes the same samples
as with `ClipDataset`, bit for bit, because they are functions of (seed, epoch, key) alone, and is checked in the same way:
the index of a shard, which lies beside it, is fetched first.

In an epoch, each shard is read by one loading process of one process of the run. The state for resuming is the epoch and the
shards that are finished.
"""

import hashlib
import random
import re
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from braceexpand import braceexpand
from numpy.typing import NDArray
from torch.utils.data import DataLoader, IterableDataset

from stm.config import Augmentation
from stm.data.batch_memory import BatchMemory, receive
from stm.data.crop_pixels import Allocate, allocate_pixels
from stm.data.dataset import ClipDataset, Sample
from stm.data.geometry import Geometry
from stm.data.loader import Batch, collate, permute
from stm.data.loading_processes import LoadingContext, start_loading
from stm.jobs.lifetime import signals_blocked
from stm.shards.index import Clip, ClipIndex
from stm.shards.reader import ShardReader
from stm.shards.schema import guide_arrays
from stm.storage.remote import PIPE, Access, fetch, open_url, show_url
from stm.storage.tables import DamagedError

__all__ = ["ClipStream", "open_stream"]

State = dict[str, Any]

_FETCHES = 8  # indexes at a time


def open_stream(
    urls: str | Sequence[str],
    geometry: Geometry,
    augmentation: Augmentation,
    seed: int,
    train: bool,
    *,
    batch_size: int,
    rank: int = 0,
    processes: int = 1,
    workers: int = 0,
    buffer: int = 100,
    indexes: str | Sequence[str] | None = None,
    storage_options: Mapping[str, Any] | None = None,
    attempts: int = 5,
    pause: float = 1.0,
    **options: Any,
) -> "ClipStream":
    """Open packed shards at URLs for training or evaluation; fetches their indexes.

    Args:
        urls: the shards' tars: `https://`, any protocol of fsspec such as `s3://` (which needs `s3fs`), local paths, or
            `pipe:` and a shell command that prints the tar, which must never come from data. Braces are expanded, in each
            of several URLs: `s3://bucket/train-{00000..00239}.tar`.
        geometry, augmentation, seed, train: as for `ClipDataset`. With `train`, shards and clips are shuffled, and clips
            that do not fill a batch of all processes are dropped.
        batch_size: clips per batch of this process.
        rank: this process's index among `processes`.
        workers: number of loading processes, at most one per shard; 0 loads in this process.
        buffer: clips among which each loading process shuffles, with `train`; it holds the stored bytes that samples need.
        indexes: the shards' indexes, as paths or URLs in the same order; by default `.parquet` in place of the tar's `.tar`
            at the end of its path. Needed for commands and for signed URLs.
        storage_options: options of fsspec's file system, such as the key; for http(s), `headers`.
        attempts: how often a shard is opened or read on after an error of the server or the network.
        pause: seconds before the second attempt; doubled before each further one.
        options: keyword arguments of `ClipDataset` that define samples: `repeats`, `guides`, `classes`, `text`, ...

    Raises:
        FileNotFoundError, PermissionError: an index is not there, or may not be read.
        OSError: a server failed in all attempts.
        ValueError: there are fewer shards than processes, or fewer clips than a batch; see also `ClipDataset`.
    """
    access = Access(storage_options or {}, attempts, pause)
    tars = _expand(urls)
    places = [_index_url(tar) for tar in tars] if indexes is None else _expand(indexes)
    if len(places) != len(tars):
        raise ValueError(f"{len(tars)} shards and {len(places)} indexes were given: one index per shard is needed")
    with tempfile.TemporaryDirectory() as folder, _shown(folder, tars, places):
        paths = _fetch_indexes(places, access, Path(folder))
        dataset = ClipDataset(ClipIndex(paths, streamed=True), geometry, augmentation, seed, train, **options)
    shards = _Shards(tars, access, dataset, buffer, (folder, tars, places))
    return ClipStream(shards, batch_size, rank, processes, workers)


def _expand(urls: str | Sequence[str]) -> list[str]:
    given = [urls] if isinstance(urls, str) else [str(url) for url in urls]
    # Braces in commands belong to the shell.
    return [each for url in given for each in ([url] if url.startswith(PIPE) else braceexpand(url))]


def _index_url(tar: str) -> str:
    if tar.startswith(PIPE) or not tar.endswith(".tar"):
        raise ValueError(
            f"{show_url(tar)}: the place of this shard's index cannot be inferred, because the URL "
            f"{'is a command' if tar.startswith(PIPE) else 'does not end in .tar'}; pass `indexes`"
        )
    return tar.removesuffix(".tar") + ".parquet"


def _fetch_indexes(places: Sequence[str], access: Access, folder: Path) -> list[Path]:
    def copy(number: int) -> Path:
        path = folder / f"{number:07d}.parquet"
        path.write_bytes(fetch(places[number], access))
        return path

    with ThreadPoolExecutor(_FETCHES) as pool:
        return list(pool.map(copy, range(len(places))))


@contextmanager
def _shown(folder: str, tars: Sequence[str], places: Sequence[str]) -> Iterator[None]:
    """A block whose errors about fetched indexes, and about the tars that would lie beside them, name URLs instead."""

    def show(match: re.Match[str]) -> str:
        return show_url((tars if match[2] == "tar" else places)[int(match[1])])

    try:
        yield
    except ValueError as error:
        message = re.sub(rf"{re.escape(folder)}/(\d+)\.(tar|parquet)", show, str(error))
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


class _Shards:
    """The shards of a stream, and how their clips become samples."""

    def __init__(
        self,
        tars: Sequence[str],
        access: Access,
        dataset: ClipDataset,
        buffer: int,
        shown: tuple[str, Sequence[str], Sequence[str]],
    ) -> None:
        self.dataset = dataset
        self.sizes: list[int] = dataset.index.count_clips().tolist()
        self.starts = np.concatenate([[0], np.cumsum(self.sizes)]).tolist()  # each shard's first clip
        self._tars = tars
        self._access = access
        self._buffer = buffer
        self._shown = shown
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
            with _shown(*self._shown):
                self._reader.hold(members)
                samples = self.dataset.samples.make(self.dataset.index[number], self._reader, epoch, allocate)
            yield [{**sample, "clip": number} for sample in samples]

    def _clips(self, shard: int, epoch: int) -> Iterator[tuple[int, dict[int, bytes]]]:
        """Each clip's index in the dataset, and the members that its samples need, by offset, in the order of the tar.

        Raises:
            DamagedError: the tar is damaged, or does not contain the clips of the index.
        """
        shown = show_url(self._tars[shard])
        numbers = range(self.starts[shard], self.starts[shard + 1])
        places = {clip.key: self._places(clip, epoch) for clip in map(self.dataset.index.__getitem__, numbers)}
        with open_url(self._tars[shard], self._access) as stream:
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


class ClipStream:
    """Batches of the clips of a set of shards that are read from start to end, for one process of a run.

    >>> with open_stream("s3://bucket/train-{00000..00239}.tar", ..., batch_size=32, workers=8) as stream:  # doctest: +SKIP
    ...     for epoch in range(stream.epoch, 800):
    ...         for batch in stream.batches(epoch): ...
    """

    def __init__(self, shards: _Shards, batch_size: int, rank: int, processes: int, workers: int) -> None:
        """
        Raises:
            ValueError: there are fewer shards than processes, or, with `train`, fewer clips than a batch of all processes.
        """
        self.batch_size = batch_size
        self.rank = rank
        self.processes = processes
        self.workers = workers
        self.epoch = 0  # that of the next batch
        self._finished: set[int] = set()  # shards of this epoch all of whose clips were in a batch
        self._shards = shards
        self._train = shards.dataset.train
        self._seed = shards.dataset.seed
        self._loader_iterator: Any = None
        filled = len(self._remaining(set()))
        if filled < processes:
            raise ValueError(
                f"there are {filled} shards with clips for {processes} processes, and each needs one: pack smaller shards "
                "(config: shard_size) or use fewer processes"
            )
        if self._train and not len(self):
            raise ValueError(
                f"the {filled} shards have {len(self.index)} clips: too few for a batch of {batch_size} clips in each of "
                f"{processes} processes; lower batch_size or add clips"
            )

    @property
    def index(self) -> ClipIndex:
        """All clips, in the order of the batches' "clip": their keys, labels and captions."""
        return self._shards.dataset.index

    @property
    def classes(self) -> list[str]:
        """Labels in the order of their class indices."""
        return self._shards.dataset.classes

    def __len__(self) -> int:
        """Batches of a whole epoch; with `train`, the same number in each process and epoch."""
        return self._count_batches(self._remaining(set()), 0)

    def __enter__(self) -> "ClipStream":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the loading processes, whatever they are doing."""
        iterator, self._loader_iterator = self._loader_iterator, None
        if self.workers and iterator is not None:
            with suppress(RuntimeError):  # one was killed meanwhile
                iterator._shutdown_workers()

    def state_dict(self) -> State:
        """What to save for resuming after the batches taken so far; it can be written as JSON."""
        return {
            "epoch": self.epoch,
            "finished": sorted(self._finished),
            "rank": self.rank,
            "processes": self.processes,
            "shards": self._digest(),
        }

    def load_state_dict(self, *states: State) -> None:
        """Resume from the states of all processes of the earlier run, whose number may have been another one.

        The epoch goes on with its remaining shards, each of them whole: clips of an unfinished shard that were already in a
        batch are seen again. Each process must load the same states.

        Raises:
            ValueError: the states are not those of all processes, differ in their epoch, or are from other shards.
        """
        if len({(state["epoch"], state["processes"], state["shards"]) for state in states}) != 1:
            raise ValueError("the states to resume from are not of one run, or not of the same step")
        ranks, count = sorted(state["rank"] for state in states), states[0]["processes"]
        if ranks != list(range(count)):
            raise ValueError(f"resuming needs the states of all {count} processes, and those of {ranks} were given")
        if states[0]["shards"] != self._digest():
            raise ValueError("the state to resume from belongs to other shards, or to the same in another order")
        self.epoch = states[0]["epoch"]
        self._finished = {shard for state in states for shard in state["finished"]}

    def _digest(self) -> str:
        """A hash of the first clip's key and the number of clips of each shard; unlike URLs, these stay the same."""
        index, shards = self.index, self._shards
        firsts = [index[shards.starts[shard]].key for shard in self._remaining(set())]
        return hashlib.sha256(repr((firsts, shards.sizes)).encode()).hexdigest()

    def _remaining(self, finished: set[int]) -> list[int]:
        return [shard for shard, size in enumerate(self._shards.sizes) if size and shard not in finished]

    def _deal(self, remaining: list[int], epoch: int) -> list[int]:
        """This process's shards, in the order in which its loading processes take turns at them."""
        if self._train:
            remaining = [remaining[n] for n in permute(len(remaining), self._seed, epoch)]
        return remaining[self.rank :: self.processes]

    def _count_batches(self, remaining: list[int], epoch: int) -> int:
        sizes = [self._shards.sizes[shard] for shard in remaining]
        if not self._train:
            return -(-sum(self._shards.sizes[shard] for shard in self._deal(remaining, epoch)) // self.batch_size)
        # Shards are not divided, so one process may have more clips than another, and other ones in each epoch. All take as
        # many batches as the smallest shards would fill, so that none waits for a gradient that never comes.
        return sum(sorted(sizes)[: len(remaining) // self.processes]) // self.batch_size

    def batches(self, epoch: int) -> Iterator[Batch]:
        """The batches of an epoch; after `load_state_dict`, those of the remaining shards of the state's epoch.

        Returns:
            Batches as those of `ClipLoader`.

        Raises:
            DamagedError: a shard is damaged, or does not match its index; the message names URL, clip and member.
            OSError: a shard cannot be opened or read, after all attempts.
        """
        if epoch != self.epoch:
            self.epoch, self._finished = epoch, set()
        remaining = self._remaining(self._finished)
        left = {shard: self._shards.sizes[shard] for shard in remaining}
        count = self._count_batches(remaining, epoch)
        loaded = self._load(self._deal(remaining, epoch), epoch)
        try:
            for number in range(count):
                batch = next(loaded)
                for clip in batch["clip"].unique().tolist():
                    shard = int(np.searchsorted(self._shards.starts, clip, side="right")) - 1
                    left[shard] -= 1
                    if not left[shard]:
                        self._finished.add(shard)
                if number + 1 == count:
                    self.epoch, self._finished = epoch + 1, set()
                yield batch
        finally:
            self.close()
        if not count:
            self.epoch, self._finished = epoch + 1, set()

    def _load(self, shards: list[int], epoch: int) -> Iterator[Batch]:
        """Batches from this process's shards, the last ones from what is left in each loading process."""
        workers = min(self.workers, len(shards))
        loader = DataLoader(
            _Reading(self._shards, shards, epoch, self.batch_size),
            batch_size=None,
            collate_fn=_unchanged,
            num_workers=workers,
            multiprocessing_context=LoadingContext() if workers else None,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=start_loading,
            generator=torch.Generator(),
            prefetch_factor=4 if workers else None,
        )
        with signals_blocked():  # inherited by the loading processes, which start here
            self._loader_iterator = iter(loader)
        left: list[list[Sample]] = []
        for part in self._loader_iterator:
            if isinstance(part, dict):
                yield receive(part)
                continue
            left += part
            while len(left) >= self.batch_size:
                yield collate(left[: self.batch_size])
                del left[: self.batch_size]
        if left:
            yield collate(left)


class _Reading(IterableDataset[Any]):
    """What a loading process reads in an epoch: whole batches, then a list of the samples that fill none."""

    def __init__(self, shards: _Shards, numbers: list[int], epoch: int, batch_size: int) -> None:
        self._shards = shards
        self._numbers = numbers
        self._epoch = epoch
        self._batch_size = batch_size

    def __iter__(self) -> Iterator[Any]:
        worker = torch.utils.data.get_worker_info()
        own = self._numbers if worker is None else self._numbers[worker.id :: worker.num_workers]
        memory = BatchMemory()
        arena = memory.open()

        def allocate(shape: tuple[int, ...]) -> NDArray[np.uint8]:
            return arena.allocate(shape)  # that of the batch at this moment

        items: list[list[Sample]] = []
        for item in self._shards.samples(own, self._epoch, allocate):
            items.append(item)
            if len(items) == self._batch_size:
                yield collate(items, arena)
                memory.close(arena)
                arena = memory.open()
                items = []
        if items:
            yield [[_copy(sample) for sample in item] for item in items]


def _copy(sample: Sample) -> Sample:
    """A sample that can be sent to the training process on its own."""
    return sample | {"jpegs": [bytes(jpeg) for jpeg in sample["jpegs"]]} if "jpegs" in sample else sample


def _unchanged(part: Any) -> Any:
    return part
