"""The batches of a run, from any step on: what connects a data set to the loop."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from stm.config import Optimisation
from stm.data.dataset import ClipDataset
from stm.data.loader import Batch
from stm.distributed.process import Process
from stm.storage.files import read_receipt, sha256_file
from stm.training.batches import Medium, feed_media


def hash_shards(indexes: Sequence[Path]) -> dict[str, str]:
    """SHA-256 of each shard's tar, by shard, from the index's receipt, or of the file where it says none.

    Shards of several datasets may have one name: all but the first are then numbered, in the order given.
    """
    found: dict[str, str] = {}
    for path in sorted(indexes, key=lambda path: path.stem):
        name, number = path.stem, 2
        while name in found:
            name, number = f"{path.stem} ({number})", number + 1
        found[name] = read_receipt(path).get("tar_sha256") or sha256_file(path.with_suffix(".tar"))
    return found


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
    return Medium("clips", dataset, settings.batch_size).steps


def feed(
    dataset: ClipDataset, settings: Optimisation, process: Process, seed: int, workers: int
) -> Callable[[int], Iterator[Batch]]:
    """Batches for `fit` of clips alone; see `stm.training.batches.feed_media`."""
    return feed_media([Medium("clips", dataset, settings.batch_size)], settings, process, seed, workers)
