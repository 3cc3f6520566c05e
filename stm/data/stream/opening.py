"""Opens a set of shards at URLs: their names, their indexes, the settings of their samples."""

import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from braceexpand import braceexpand

from stm.config import Augmentation
from stm.data.dataset import ClipDataset
from stm.data.geometry import Geometry
from stm.data.stream.batches import ClipStream
from stm.data.stream.shards import StreamedShards, Urls, name_urls
from stm.shards.index import ClipIndex
from stm.storage.remote import PIPE, Access, fetch, show_url

_FETCHES = 8  # indexes at a time


def open_stream(
    urls: str | Path | Sequence[str | Path],
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
    indexes: str | Path | Sequence[str | Path] | None = None,
    storage_options: Mapping[str, Any] | None = None,
    attempts: int = 5,
    pause: float = 1.0,
    **options: Any,
) -> ClipStream:
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
        ValueError: there are fewer shards than processes, or fewer clips than a batch; `rank` is not one of the processes; see
            also `ClipDataset`.
    """
    access = Access(storage_options or {}, attempts, pause)
    tars = _expand(urls)
    places = [_index_url(tar) for tar in tars] if indexes is None else _expand(indexes)
    if len(places) != len(tars):
        raise ValueError(f"{len(tars)} shards and {len(places)} indexes were given: one index per shard is needed")
    with tempfile.TemporaryDirectory() as folder, name_urls(names := Urls(folder, tars, places)):
        paths = _fetch_indexes(places, access, Path(folder))
        dataset = ClipDataset(ClipIndex(paths, streamed=True), geometry, augmentation, seed, train, **options)
    shards = StreamedShards(names, access, dataset, buffer)
    return ClipStream(shards, batch_size, rank, processes, workers)


def _expand(urls: str | Path | Sequence[str | Path]) -> list[str]:
    given = [str(urls)] if isinstance(urls, str | Path) else [str(url) for url in urls]
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
