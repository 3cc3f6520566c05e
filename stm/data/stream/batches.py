"""Batches from streamed shards: dealing the shards of an epoch out, and the state for resuming.

In an epoch, each shard is read by one loading process of one process of the run. The state for resuming is the epoch and the
shards that are finished.
"""

import hashlib
from collections.abc import Generator, Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, IterableDataset

from stm.data.batch_memory import BatchMemory, receive
from stm.data.dataset import Sample
from stm.data.loader import Batch, collate, permute
from stm.data.loading_processes import LoadingContext, start_loading
from stm.data.stream.shards import StreamedShards
from stm.jobs.lifetime import signals_blocked
from stm.shards.index import ClipIndex

State = dict[str, Any]


class ClipStream:
    """Batches of the clips of a set of shards that are read from start to end, for one process of a run.

    Examples:
        >>> with open_stream("s3://bucket/train-{00000..00239}.tar", ..., batch_size=32, workers=8) as stream:  # doctest: +SKIP
        ...     for epoch in range(stream.epoch, 800):
        ...         for batch in stream.batches(epoch): ...
    """

    def __init__(self, shards: StreamedShards, batch_size: int, rank: int, processes: int, workers: int) -> None:
        """
        Raises:
            ValueError: there are fewer shards than processes, or, with `train`, fewer clips than a batch of all processes; or
                `rank` is not one of the processes.
        """
        if not 0 <= rank < processes:
            raise ValueError(f"rank is {rank}, and must be from 0 to {processes - 1} for {processes} processes")
        self.batch_size = batch_size
        self.rank = rank
        self.processes = processes
        self.workers = workers
        self.epoch = 0  # that of the next batch
        self._finished: set[int] = set()  # shards of this epoch all of whose clips were in a batch
        self._resumed: set[int] = set()  # those of the earlier run, of all processes
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
        self._end(iterator)

    def _end(self, iterator: Any) -> None:
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
        self._resumed = set(self._finished)

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

    def __iter__(self) -> Iterator[Batch]:
        """The batches of `epoch`: those of the next epoch after a whole loop, of the same one after a loop that was left."""
        return self.batches(self.epoch)

    def batches(self, epoch: int) -> Iterator[Batch]:
        """The batches of an epoch; after `load_state_dict`, those of the remaining shards of the state's epoch.

        An epoch that was left unfinished starts again when it is asked for again.

        Returns:
            Batches as those of `ClipLoader`.

        Raises:
            DamagedError: a shard is damaged, or does not match its index; the message names URL, clip and member.
            OSError: a shard cannot be opened or read, after all attempts.
        """
        if epoch != self.epoch:
            self._start(epoch)
        # Not those that were finished meanwhile: only this process knows them, and all must deal out the same shards.
        self._finished = set(self._resumed)
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
                    self._start(epoch + 1)
                yield batch
        finally:
            loaded.close()
        if not count:
            self._start(epoch + 1)

    def _start(self, epoch: int) -> None:
        self.epoch = epoch
        self._finished = set()
        self._resumed = set()

    def _load(self, shards: list[int], epoch: int) -> Generator[Batch, None, None]:
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
            iterator = self._loader_iterator = iter(loader)
        left: list[list[Sample]] = []
        try:
            for part in iterator:
                if isinstance(part, dict):
                    yield receive(part)
                    continue
                left += part
                while len(left) >= self.batch_size:
                    yield collate(left[: self.batch_size])
                    del left[: self.batch_size]
            if left:
                yield collate(left)
        finally:
            self._end(iterator)


class _Reading(IterableDataset[Any]):
    """What a loading process reads in an epoch: whole batches, then a list of the samples that fill none."""

    def __init__(self, shards: StreamedShards, numbers: list[int], epoch: int, batch_size: int) -> None:
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
