"""The batches of a run, from any step on: what connects a data set to the loop."""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from stm.config import Optimisation
from stm.data.dataset import ClipDataset
from stm.data.loader import Batch, ClipLoader
from stm.files import read_receipt, sha256_file
from stm.training.distributed import Process
from stm.training.interruption import signals_blocked


def hash_shards(indexes: Sequence[Path]) -> dict[str, str]:
    """SHA-256 of each shard's tar, by shard, from the index's receipt, or of the file where it says none."""
    return {
        path.stem: read_receipt(path).get("tar_sha256") or sha256_file(path.with_suffix(".tar"))
        for path in sorted(indexes)
    }


def read_text_model(indexes: Sequence[Path]) -> dict[str, str] | None:
    """What identifies the text encoder of the packed captions' vectors, from the receipts; None where they do not say.

    Raises:
        ValueError: the shards' vectors are of different encoders, and say nothing about each other.
    """
    models = {path: read_receipt(path).get("text_model") for path in indexes}
    first = next(iter(models))
    for path, model in models.items():
        if model != models[first]:
            raise ValueError(
                f"the captions' vectors in {first} and in {path} are of different text encoders; run the stages `text` "
                "and `shards` again for both"
            )
    return models[first]


def count_steps(dataset: ClipDataset, settings: Optimisation) -> int:
    """Optimiser steps of an epoch: samples // batch_size; the rest is left out, another one in each epoch.

    Raises:
        ValueError: there are fewer samples than a batch.
    """
    samples = len(dataset) * dataset.samples_per_clip
    if samples < settings.batch_size:
        views = f" x {dataset.samples_per_clip} repeats" if dataset.samples_per_clip > 1 else ""
        raise ValueError(
            f"the training split has {len(dataset)} clips{views}, fewer than one batch of "
            f"optimisation.batch_size = {settings.batch_size}; set batch_size to {samples} or less, or add clips"
        )
    return samples // settings.batch_size


def feed(
    dataset: ClipDataset, settings: Optimisation, process: Process, seed: int, workers: int
) -> Callable[[int], Iterator[Batch]]:
    """Batches for `fit`: `settings.accumulate` a step, from the step it is given to the end of the run.

    Raises:
        ValueError: a forward pass would not hold whole clips with all their repeats.
    """
    samples, parts = settings.batch_size, settings.accumulate * process.count
    clips, rest = divmod(samples, parts * dataset.samples_per_clip)
    if rest:
        raise ValueError(
            f"optimisation.batch_size = {samples} is not a multiple of accumulate x processes x repeats = "
            f"{settings.accumulate} x {process.count} x {dataset.samples_per_clip}"
        )
    per_epoch = count_steps(dataset, settings)
    loader = ClipLoader(
        dataset,
        clips,
        shuffle=True,
        seed=seed,
        rank=process.rank,
        processes=process.count,
        workers=workers,
    )

    def batches(step: int) -> Iterator[Batch]:
        for epoch in range(step // per_epoch, settings.epochs):
            done = step % per_epoch if epoch == step // per_epoch else 0
            with signals_blocked():
                passes = loader.batches(epoch, start=done * settings.accumulate * loader.global_batch)
            yield from islice(passes, (per_epoch - done) * settings.accumulate)

    return batches
