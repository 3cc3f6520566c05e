"""Batches that alternate between media, such as clips and images: each optimiser step sees one medium (UMT, stage 2)."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stm.config import Optimisation
from stm.data.dataset import ClipDataset
from stm.data.loader import Batch, ClipLoader
from stm.distributed.process import Process
from stm.storage.files import sha256_file
from stm.storage.tables import read_receipt


class Medium(NamedTuple):
    """A dataset to sample from, and the batch size of its steps."""

    name: str  # for messages
    dataset: ClipDataset
    batch_size: int  # samples per optimiser step, over all processes and forward passes
    key: str = "optimisation.batch_size"  # its key in the config, for messages

    @property
    def steps(self) -> int:
        """Optimiser steps per epoch. The last samples, too few for a step, are dropped; because of the shuffle, they differ
        from epoch to epoch.

        Raises:
            ValueError: there are fewer samples than one batch needs.
        """
        samples = len(self.dataset) * self.dataset.samples_per_clip
        if samples < self.batch_size:
            views = f" x {self.dataset.samples_per_clip} repeats" if self.dataset.samples_per_clip > 1 else ""
            raise ValueError(
                f"the training split has {len(self.dataset)} {self.name}{views}, fewer than one batch of {self.key} = "
                f"{self.batch_size}; set batch_size to {samples} or less, or add {self.name}"
            )
        return samples // self.batch_size


def order_steps(media: Sequence[Medium], seed: int, epoch: int) -> NDArray[np.int64]:
    """Which medium each step of an epoch sees, int64 [steps]: all steps of all media, shuffled."""
    steps = np.repeat(np.arange(len(media)), [medium.steps for medium in media])
    generator = np.random.Generator(
        np.random.PCG64([seed, epoch, 7])
    )  # 7: a random stream separate from the clips' order
    return generator.permutation(steps) if len(media) > 1 else steps


def count_media_steps(media: Sequence[Medium]) -> int:
    """Optimiser steps per epoch over all media."""
    return sum(medium.steps for medium in media)


def feed_media(
    media: Sequence[Medium],
    settings: Optimisation,
    process: Process,
    seed: int,
    workers: int,
    paired: bool = False,
) -> Callable[[int], Iterator[Batch]]:
    """Batches for `fit`: `settings.accumulate` per step, all of one medium, from a given step to the end of the run.

    The medium of each step and the order of each medium's clips depend on (seed, epoch) alone, so a resumed run sees
    exactly the batches that an uninterrupted one would have seen. The loading processes end with the iterator.

    Args:
        paired: see `ClipLoader`.

    Raises:
        ValueError: a forward pass would not contain a whole number of clips with all their repeats, or a medium has
            fewer samples than one batch needs.
    """
    per_epoch = count_media_steps(media)
    loaders = [_make_loader(medium, settings, process, seed, workers, paired) for medium in media]

    def batches(step: int) -> Iterator[Batch]:
        with ExitStack() as stack:
            for loader in loaders:
                stack.enter_context(loader)
            for epoch in range(step // per_epoch, settings.epochs):
                order = order_steps(media, seed, epoch)
                done = step % per_epoch if epoch == step // per_epoch else 0
                # Each medium resumes after the batches that the finished steps of this epoch have used.
                before = np.bincount(order[:done], minlength=len(media)).tolist()
                streams = [
                    loader.batches(epoch, start=steps * settings.accumulate * loader.global_batch)
                    for loader, steps in zip(loaders, before, strict=True)
                ]
                for medium in order[done:].tolist():
                    for _ in range(settings.accumulate):
                        yield next(streams[medium])

    return batches


def _make_loader(
    medium: Medium, settings: Optimisation, process: Process, seed: int, workers: int, paired: bool
) -> ClipLoader:
    parts = settings.accumulate * process.count
    # A batch counts samples, a loader counts clips: all repeats of a clip are in the same forward pass.
    clips, rest = divmod(medium.batch_size, parts * medium.dataset.samples_per_clip)
    if rest:
        raise ValueError(
            f"{medium.key} = {medium.batch_size} is not a multiple of accumulate x processes x repeats = "
            f"{settings.accumulate} x {process.count} x {medium.dataset.samples_per_clip}"
        )
    return ClipLoader(
        medium.dataset,
        clips,
        shuffle=True,
        seed=seed,
        rank=process.rank,
        processes=process.count,
        workers=workers,
        paired=paired,
    )


def hash_shards(indexes: Sequence[Path]) -> dict[str, str]:
    """SHA-256 of each shard's tar, by shard name: from the index's receipt if it is there, otherwise computed from the file.

    Shards of different datasets may have the same name: all but the first then get a numeric suffix, in the order given.
    """
    hashes: dict[str, str] = {}
    for path in sorted(indexes, key=lambda path: path.stem):
        name = path.stem
        number = 2
        while name in hashes:
            name = f"{path.stem} ({number})"
            number += 1
        hashes[name] = read_receipt(path).get("tar_sha256") or sha256_file(path.with_suffix(".tar"))
    return hashes


def read_text_model(indexes: Sequence[Path]) -> dict[str, str] | None:
    """The identity of the text encoder that embedded the packed captions, from the receipts; None if they do not name it.

    Raises:
        ValueError: the shards' text vectors come from different encoders and cannot be compared.
    """
    models = {path: read_receipt(path).get("text_model") for path in indexes}
    first = next(iter(models))
    for path, model in models.items():
        if model != models[first]:
            raise ValueError(
                f"the captions' vectors in {first} and in {path} come from different text encoders; run the stages `text` "
                "and `shards` again for both"
            )
    return models[first]


def count_steps(dataset: ClipDataset, settings: Optimisation) -> int:
    """Optimiser steps per epoch: samples // batch_size; the remaining samples, which differ per epoch, are dropped.

    Raises:
        ValueError: there are fewer samples than one batch needs.
    """
    return Medium("clips", dataset, settings.batch_size).steps


def feed(
    dataset: ClipDataset, settings: Optimisation, process: Process, seed: int, workers: int, paired: bool = False
) -> Callable[[int], Iterator[Batch]]:
    """Batches for `fit` from a single dataset of clips; see `feed_media`."""
    return feed_media([Medium("clips", dataset, settings.batch_size)], settings, process, seed, workers, paired)
