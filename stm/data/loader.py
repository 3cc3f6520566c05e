"""Groups samples into batches, in an order that is a function of (seed, epoch).

The whole state of loading is (epoch, clips seen): `batches(epoch, start)` resumes where a run stopped, with exactly the
batches that an uninterrupted run would have seen. The number of worker processes affects only the speed, and the N processes
of a run together see what a single one would.
"""

from collections.abc import Generator, Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Sampler

from stm.data.batch_memory import Arena, BatchMemory, receive
from stm.data.dataset import ClipDataset, Sample
from stm.data.decoding import decode_batch, join_jpegs
from stm.data.loading_processes import LoadingContext, share, start_loading
from stm.data.resizing import join_crops, resize_batch
from stm.jobs.lifetime import signals_blocked

Batch = dict[str, Any]

INTEGERS = ("label", "clip", "view", "caption_index")


def permute(clips: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The shuffled order of an epoch's clips, int64 [clips]."""
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(clips)


def collate(items: list[list[Sample]], arena: Arena | None = None) -> Batch:
    """Stacks the samples of several clips, clip by clip, into one batch.

    Args:
        items: the samples of each clip.
        arena: the memory for their pixels, in which videos may already be.

    Returns:
        "video" uint8 [B, T, 3, S, S]; "guides" {"noise" and maps: float32 [B, slots, N], "flow": float32
        [B, 2, T, R, C, 2]}; "text" float32 [B, D] if the dataset reads it; "label", "clip", "view", "caption_index" int64 [B];
        "key", "caption" lists of B strings. B counts samples: clips x repeats (or views x crops). For samples that are not
        resized yet, "crops" (see `join_crops`) instead of "video"; for those that are not decoded yet, "jpegs" (see
        `join_jpegs`). In a loading process, pixels may be on their way through shared memory (see `receive`).
    """
    samples = [sample for item in items for sample in item]
    batch: Batch = _join_pixels(items, Arena() if arena is None else arena)
    names = samples[0]["guides"]
    batch["guides"] = {n: torch.from_numpy(np.stack([s["guides"][n] for s in samples])) for n in names}
    if "text" in samples[0]:
        batch["text"] = torch.from_numpy(np.stack([sample["text"] for sample in samples]))
    batch |= {name: torch.tensor([sample[name] for sample in samples]) for name in INTEGERS}
    batch = _share(batch)
    return batch | {name: [sample[name] for sample in samples] for name in ("key", "caption")}


def _share(value: Any) -> Any:
    """The same nested dicts, with all tensors in shared memory in a loading process; see `share`."""
    if isinstance(value, dict):
        return {name: _share(part) for name, part in value.items()}
    return share(value) if isinstance(value, torch.Tensor) else value


def _join_pixels(items: list[list[Sample]], arena: Arena) -> Batch:
    samples = [sample for item in items for sample in item]
    if "video" in samples[0]:
        return {"video": arena.hand_over(arena.join([sample["video"] for sample in samples]))}
    if "jpegs" in samples[0]:
        data, rest = join_jpegs(items, arena.allocate)
        return {"jpegs": {"data": arena.hand_over(data), **rest}}
    crops, flips = [sample["crop"] for sample in samples], [sample["flip"] for sample in samples]
    joined = join_crops(crops, flips, samples[0]["image_size"], samples[0]["interpolation"], arena.allocate)
    return {"crops": {**joined, "pixels": arena.hand_over(joined["pixels"].numpy())}}


class _Batches(Dataset[Batch]):
    """Batches of a dataset's clips, each given by its (epoch, clip) pairs."""

    def __init__(self, dataset: ClipDataset) -> None:
        self.dataset = dataset
        self._memory = BatchMemory()

    def __getitem__(self, clips: list[tuple[int, int]]) -> Batch:
        arena = self._memory.open()
        self.dataset.allocate = arena.allocate
        batch = collate([self.dataset[clip] for clip in clips], arena)
        self._memory.close(arena)
        return batch


def _as_it_is(batch: Any) -> Any:
    return batch


class _Order(Sampler[list[tuple[int, int]]]):
    """The (epoch, clip) pairs of this process's batches; the loader sets them before each epoch."""

    def __init__(self) -> None:
        self.batches: list[list[tuple[int, int]]] = []

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class ClipLoader:
    """Batches of a dataset for one process of a run.

    Its loading processes start with the first batch and end with `close`, or with the block of a `with` statement.

    Examples:
        >>> with ClipLoader(dataset, batch_size=32, shuffle=True, workers=4) as loader:  # doctest: +SKIP
        ...     for batch in loader.batches(epoch=3, start=1024): ...
    """

    def __init__(
        self,
        dataset: ClipDataset,
        batch_size: int,
        *,
        shuffle: bool,
        seed: int = 0,
        drop_last: bool | None = None,
        rank: int = 0,
        processes: int = 1,
        workers: int = 0,
        paired: bool = False,
    ) -> None:
        """
        Args:
            batch_size: clips per batch of this process; the batch contains batch_size x repeats (or views) samples.
            shuffle: use a new order in each epoch instead of the dataset's.
            seed: seed of the order; samples use the dataset's seed.
            drop_last: drop the clips that do not fill a batch of all processes; on by default when shuffling.
            rank: this process's index among `processes`.
            workers: number of loading processes; 0 loads in this process.
            paired: whether clip i and clip C - 1 - i of the C clips of a step are in one process, at mirrored places of its
                batch, for `batch_size` even. By default a process's clips lie side by side in the step.

        Raises:
            ValueError: with `drop_last`, there are fewer clips than one batch.
        """
        self.dataset = dataset
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.drop_last = shuffle if drop_last is None else drop_last
        self.rank = rank
        self.processes = processes
        self.paired = paired and processes > 1
        if self.drop_last and len(dataset) < self.global_batch:
            raise ValueError(
                f"the data has {len(dataset)} clips, and one batch takes {self.global_batch} "
                f"({processes} processes x {batch_size}): lower batch_size or add clips"
            )
        self.workers = workers
        self._order = _Order()
        self._epoch = 0  # that of the next loop over the loader
        self._loader: DataLoader[Batch] | None = None  # made when it is used
        self._iterator: Any = None  # the loader's, which holds the loading processes from epoch to epoch

    def _make_loader(self) -> DataLoader[Batch]:
        return DataLoader(
            _Batches(self.dataset),
            batch_size=None,  # the sampler's items are whole batches
            sampler=self._order,
            collate_fn=_as_it_is,
            num_workers=self.workers,
            multiprocessing_context=LoadingContext() if self.workers else None,
            # Copies to the device are asynchronous only from pinned memory.
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=start_loading,
            # Not the global generator: a DataLoader draws a random number on each start, and a resumed run has more starts.
            generator=torch.Generator(),
            # Workers keep their open tars and cached frames from epoch to epoch.
            persistent_workers=self.workers > 0,
            prefetch_factor=4 if self.workers > 0 else None,
        )

    def __enter__(self) -> "ClipLoader":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the loading processes, whatever they are doing; the next call of `batches` starts new ones."""
        iterator = self._iterator
        self._iterator = None
        self._loader = None
        if self.workers and iterator is not None:
            # torch has no public way to end them before the last reference is gone, which an error's traceback may hold.
            with suppress(RuntimeError):  # one was killed meanwhile
                iterator._shutdown_workers()

    @property
    def global_batch(self) -> int:
        """Clips per step over all processes."""
        return self.batch_size * self.processes

    @property
    def clips_per_epoch(self) -> int:
        """Clips per epoch over all processes, excluding those that `drop_last` drops."""
        clips = len(self.dataset)
        return clips // self.global_batch * self.global_batch if self.drop_last else clips

    @property
    def clips_of_process(self) -> int:
        """Clips per epoch of this process."""
        return sum(map(len, self._deal(list(range(self.clips_per_epoch)), 0)))

    def __len__(self) -> int:
        """This process's batches per epoch; without `drop_last` the last processes may have one fewer."""
        return -(-max(self.clips_per_epoch - self.rank * self.batch_size, 0) // self.global_batch)

    def __iter__(self) -> Iterator[Batch]:
        """The batches of an epoch: of epoch 0 in the first loop over the loader, and of the next one in each further loop."""
        epoch = self._epoch
        self._epoch += 1
        return self.batches(epoch)

    def batches(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """The epoch's batches after the first `start` clips, counted over all processes."""
        clips = len(self.dataset)
        order = permute(clips, self.seed, epoch) if self.shuffle else np.arange(clips)
        # The DataLoader and its workers persist; only the list that its sampler yields changes.
        self._order.batches = self._deal(order[start : self.clips_per_epoch].tolist(), epoch)
        if self._loader is None:
            self._loader = self._make_loader()
        with signals_blocked():  # inherited by the loading processes, which start here
            self._iterator = iter(self._loader)
        return map(receive, self._iterator)

    def _deal(self, clips: list[int], epoch: int) -> list[list[tuple[int, int]]]:
        """Split the order into steps and each step into one batch per process; return this process's batches."""
        steps = [clips[at : at + self.global_batch] for at in range(0, len(clips), self.global_batch)]
        return [[(epoch, clip) for clip in part] for part in map(self._own_part, steps) if part]

    def _own_part(self, step: list[int]) -> list[int]:
        """This process's clips of a step."""
        if not self.paired:
            return step[self.rank * self.batch_size : (self.rank + 1) * self.batch_size]
        half, end = self.batch_size // 2, len(step) - self.rank * (self.batch_size // 2)
        return step[self.rank * half : (self.rank + 1) * half] + step[end - half : end]


def move(batch: Batch, device: torch.device | str) -> Batch:
    """The batch with its tensors on `device`; copies from pinned memory are asynchronous."""
    return {name: _move_value(value, torch.device(device)) for name, value in batch.items()}


def move_ahead(batches: Iterator[Batch], device: torch.device) -> Generator[Batch, None, None]:
    """Move batches to `device`, and decode JPEGs and resize crops there unless they already are. On CUDA this is done for the
    next batch on a separate stream while the device processes the current one."""
    if device.type != "cuda":
        yield from (_finish(batch, device) for batch in batches)
        return
    side = torch.cuda.Stream(device)
    while True:
        with torch.cuda.stream(side):
            batch = next(batches, None)
            moved = None if batch is None else _finish(batch, device)
        if moved is None:
            return
        current = torch.cuda.current_stream(device)
        current.wait_stream(side)
        _hold(moved, current)
        yield moved


def _finish(batch: Batch, device: torch.device) -> Batch:
    return resize_batch(move(decode_batch(batch, device), device))


def _hold(value: Any, stream: torch.cuda.Stream) -> None:
    """Keeps the memory of a batch's tensors, which the copying stream allocated, until `stream` has finished with them."""
    if isinstance(value, torch.Tensor):
        value.record_stream(stream)
    elif isinstance(value, dict):
        for part in value.values():
            _hold(part, stream)


def _move_value(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    return move(value, device) if isinstance(value, dict) else value
