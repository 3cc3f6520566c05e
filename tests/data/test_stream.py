"""Shards streamed from URLs: the samples of local shards, each clip once, in an order of epoch and seed, resumed by shard."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from operator import eq
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from file_server import FileServer, serve

from stm.config import Augmentation
from stm.data.dataset import ClipDataset
from stm.data.geometry import Geometry
from stm.data.loader import ClipLoader
from stm.data.stream import ClipStream, open_stream
from stm.storage.tables import DamagedError

GEOMETRY = Geometry(image_size=16, patch_size=8, tubelet=2, frames=2)
SIZES = (3, 4, 3, 5, 2, 4, 3)  # clips per shard


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from reference_shards import make_clip, write_shard

    folder = tmp_path_factory.mktemp("shards")
    text = np.eye(3, 6, dtype=np.float16)
    for shard, size in enumerate(SIZES):
        clips = [make_clip(10 * shard + n, frames=5, width=20, height=16, text=text) for n in range(size)]
        write_shard(folder / f"train-{shard:05d}.parquet", clips)
    return folder


@pytest.fixture
def server(folder: Path) -> Iterator[FileServer]:
    with serve(folder) as running:
        yield running


def open_shards(place: Any, train: bool = True, shards: int = len(SIZES), seed: int = 1, **options: Any) -> ClipStream:
    options = {"batch_size": 2, "pause": 0.0, "buffer": 4} | options
    urls = f"{place}/train-{{00000..{shards - 1:05d}}}.tar"
    return open_stream(urls, GEOMETRY, Augmentation(), seed, train, **options)


def keys(stream: ClipStream, epoch: int = 0) -> list[str]:
    return [key for batch in stream.batches(epoch) for key in batch["key"]]


def equal(first: Any, second: Any) -> bool:
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[name], second[name]) for name in first)
    return np.array_equal(first, second) if isinstance(first, np.ndarray) else first == second


@pytest.mark.parametrize("train", [True, False])
def test_samples_are_those_of_the_local_dataset_bit_for_bit(folder: Path, server: FileServer, train: bool) -> None:
    options: dict[str, Any] = {"repeats": 2, "views": 2, "text": True, "guides": ("similarity", "motion")}
    local = ClipDataset(sorted(folder.glob("*.parquet")), GEOMETRY, Augmentation(), 1, train, **options)
    streamed = list(open_shards(server.url, train, **options)._shards.samples(range(len(SIZES)), 3))
    assert sorted(item[0]["clip"] for item in streamed) == list(range(sum(SIZES)))
    for item in streamed:
        assert all(equal(a, b) for a, b in zip(item, local[3, item[0]["clip"]], strict=True))
    assert len(streamed[0]) == 2 and len(server.requests) == 2 * len(SIZES)  # each index and each tar is read once


def test_shards_come_from_object_stores_commands_and_folders_alike(folder: Path, server: FileServer) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(f"{folder}/", "/streamed/", recursive=True)
    expected = keys(open_shards(server.url))
    assert keys(open_shards(folder)) == keys(open_shards("memory://streamed", workers=1)) == expected
    commands = [f"pipe:cat '{folder}/train-{n:05d}.tar'" for n in range(len(SIZES))]
    indexes = f"{folder}/train-{{00000..00006}}.parquet"
    options: dict[str, Any] = {"batch_size": 2, "buffer": 4}
    assert keys(open_stream(commands, GEOMETRY, Augmentation(), 1, True, indexes=indexes, **options)) == expected
    with pytest.raises(ValueError, match=r"pipe:\(command\).*is a command; pass `indexes`"):
        open_stream(commands, GEOMETRY, Augmentation(), 1, True, **options)
    with pytest.raises(ValueError, match="7 shards and 1 indexes"):
        open_stream(commands, GEOMETRY, Augmentation(), 1, True, indexes=indexes[:-22] + "0.parquet", **options)


@pytest.mark.parametrize("processes, workers", [(1, 0), (1, 3), (2, 2), (3, 0), (7, 0)])
def test_every_clip_is_seen_once_by_all_processes_and_workers_together(
    folder: Path, processes: int, workers: int
) -> None:
    seen: Counter[str] = Counter()
    for rank in range(processes):
        with open_shards(folder, False, rank=rank, processes=processes, workers=workers, batch_size=3) as stream:
            batches = list(stream.batches(0))
            assert len(batches) == len(stream)
            assert all(len(batch["key"]) == 3 for batch in batches[:-1])
            seen.update(key for batch in batches for key in batch["key"])
    assert len(seen) == sum(SIZES) and set(seen.values()) == {1}


@pytest.mark.parametrize("processes, batch_size", [(1, 4), (2, 3), (3, 2), (7, 1)])
def test_training_takes_equal_numbers_of_full_batches_in_all_processes(
    folder: Path, processes: int, batch_size: int
) -> None:
    ranks = [
        open_shards(
            folder, rank=rank, processes=processes, workers=2 * (rank == 1 == processes - 1), batch_size=batch_size
        )
        for rank in range(processes)
    ]
    for epoch in range(2):
        batches = [[batch["key"] for batch in stream.batches(epoch)] for stream in ranks]
        assert {len(each) for each in batches} == {len(ranks[0])} and len(ranks[0]) >= 1
        assert {len(batch) for each in batches for batch in each} == {batch_size}
        seen = Counter(key for each in batches for batch in each for key in batch)
        assert set(seen.values()) == {1}
    # By hand: the smallest shards that each process has at the least, 2+3+3+3+4+4+5, 2+3+3, 2+3, 2.
    smallest = {1: 24, 2: 8, 3: 5, 7: 2}[processes]
    assert len(ranks[0]) == smallest // batch_size


def test_the_order_depends_on_epoch_and_seed_alone(folder: Path, server: FileServer) -> None:
    stream = open_shards(folder, workers=2)
    first, second = keys(stream, 0), keys(stream, 1)
    assert first != second and set(first) == set(second)
    assert (
        keys(open_shards(server.url, workers=2), 1) == second
    )  # wherever the shards are, and whatever was read before
    other = keys(open_shards(folder, workers=2, seed=2))
    assert other != first and set(other) == set(first)
    shards = [key[5:7] for key in first]
    assert shards != sorted(shards)
    unshuffled = keys(open_shards(folder, train=False))
    assert unshuffled == sorted(unshuffled)
    # Clips of a shard are shuffled with those of the next one: there are more changes of shard than shards.
    shards = [key[5:7] for key in keys(open_shards(folder))]
    assert sum(a != b for a, b in pairwise(shards)) > len(SIZES) - 1


@pytest.mark.parametrize("before, after", [(1, 1), (2, 2), (2, 3), (3, 1)])
def test_a_resumed_run_sees_each_remaining_shard_once(folder: Path, before: int, after: int) -> None:
    states, seen = [], Counter()  # type: ignore[var-annotated]
    for rank in range(before):
        with open_shards(folder, False, rank=rank, processes=before, workers=2, batch_size=1) as stream:
            batches = stream.batches(4)
            seen.update(next(batches)["key"][0] for _ in range(5))
            states.append(json.loads(json.dumps(stream.state_dict())))
    finished = {shard for state in states for shard in state["finished"]}
    assert finished == {n for n, size in enumerate(SIZES) if sum(int(key[5:]) // 10 == n for key in seen) == size}
    again: Counter[str] = Counter()
    for rank in range(after):
        with open_shards(folder, False, rank=rank, processes=after, batch_size=2) as stream:
            stream.load_state_dict(*states)
            assert stream.epoch == 4
            again.update(keys(stream, stream.epoch))
            assert stream.state_dict()["epoch"] == 5 and stream.state_dict()["finished"] == []
            assert len(keys(stream, 5)) > 0
    expected = {n for n in range(len(SIZES)) if n not in finished}
    assert set(again.values()) == {1} and {int(key[5:]) // 10 for key in again} == expected
    assert len(again) == sum(SIZES[n] for n in expected)


def test_the_last_batch_ends_the_epoch_and_training_goes_on_where_it_was(folder: Path) -> None:
    stream = open_shards(folder, batch_size=4)
    taken = stream.batches(0)
    for _ in range(len(stream)):
        next(taken)
    assert stream.state_dict()["epoch"] == 1
    resumed = open_shards(folder, batch_size=4)
    resumed.load_state_dict(stream.state_dict())
    assert keys(resumed, resumed.epoch) == keys(stream, 1)


def test_an_epoch_that_is_started_again_is_whole_in_all_processes(folder: Path) -> None:
    ranks = [open_shards(folder, False, rank=rank, processes=2, batch_size=1) for rank in range(2)]
    seen = Counter[str]()
    for stream in ranks:
        first = stream.batches(0)
        while not stream.state_dict()["finished"]:
            next(first)
        batches = list(stream.batches(0))
        assert len(batches) == len(stream) > 1
        seen.update(key for batch in batches for key in batch["key"])
    assert len(seen) == sum(SIZES) and set(seen.values()) == {1}


def test_a_second_iterator_outlives_the_first(folder: Path) -> None:
    with open_shards(folder, workers=1, shards=2) as stream:
        first = stream.batches(0)
        next(first)
        second = stream.batches(0)
        taken = [next(second)]
        first.close()  # type: ignore[attr-defined]
        assert len([*taken, *second]) == len(stream)


def test_states_of_other_shards_or_of_some_processes_are_refused(folder: Path) -> None:
    states = [open_shards(folder, rank=rank, processes=2).state_dict() for rank in range(2)]
    stream = open_shards(folder)
    with pytest.raises(ValueError, match=r"states of all 2 processes, and those of \[1\]"):
        stream.load_state_dict(states[1])
    with pytest.raises(ValueError, match="not of one run"):
        stream.load_state_dict(states[0], {**states[1], "epoch": 3})
    with pytest.raises(ValueError, match="other shards"):
        open_shards(folder, shards=6).load_state_dict(*states)


def test_too_few_shards_or_clips_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="2 shards with clips for 3 processes"):
        open_shards(folder, shards=2, processes=3)
    with pytest.raises(ValueError, match="rank is 2, and must be from 0 to 1 for 2 processes"):
        open_shards(folder, rank=2, processes=2)
    with pytest.raises(ValueError, match="have 24 clips: too few for a batch of 9 clips in each of 2"):
        open_shards(folder, processes=2, batch_size=9)


def test_transient_errors_of_the_server_change_nothing(folder: Path, server: FileServer) -> None:
    expected = list(open_shards(folder).batches(0))
    server.faults |= {"train-00000.parquet": [503], "train-00001.tar": ["cut", "cut"], "train-00002.tar": [500, "cut"]}
    batches = list(open_shards(server.url, workers=2).batches(0))
    assert sorted(k for b in batches for k in b["key"]) == sorted(k for b in expected for k in b["key"])
    assert server.names().count("train-00002.tar") == 3
    server.faults["train-00003.tar"] = [503] * 9
    with pytest.raises(OSError, match=r"cannot be read \(HTTP status 503\): '.*train-00003\.tar'"):
        keys(open_shards(f"{server.url.replace('//', '//user:secret@')}"))


def damage(folder: Path, tmp_path: Path, change: Callable[[bytearray], Any]) -> Path:
    """A copy of the first shards, whose second tar is changed."""
    for name in ("train-00000", "train-00001"):
        for ending in (".tar", ".parquet"):
            (tmp_path / name).with_suffix(ending).write_bytes((folder / name).with_suffix(ending).read_bytes())
    tar = tmp_path / "train-00001.tar"
    data = bytearray(tar.read_bytes())
    tar.write_bytes(bytes(change(data) or data))
    return tmp_path


def find(data: bytearray, name: str) -> int:
    """The first byte of a member of a tar."""
    return data.index(f"{name}\0".encode()) + 512


def flip(name: str) -> Callable[[bytearray], None]:
    def change(data: bytearray) -> None:
        data[find(data, name) + 150] ^= 1

    return change


def rename(data: bytearray) -> bytearray:
    import io
    import tarfile

    made = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(data)) as old, tarfile.open(fileobj=made, mode="w") as new:
        for member in old.getmembers():
            content = old.extractfile(member)
            member.name = member.name.replace("011.0002", "011.0009")
            new.addfile(member, content)
    return bytearray(made.getvalue())


@pytest.mark.parametrize(
    "change, message",
    [
        (flip("clip-012.0003.jpg"), "train-00001.tar: frame 3 of clip 'clip-012' differs from its checksum"),
        (flip("clip-012.motion.npy"), "train-00001.tar: motion array of clip 'clip-012' differs from its checksum"),
        (rename, "train-00001.tar: clip-011.0002.jpg is missing"),
        (lambda d: d[: find(d, "clip-012.0001.jpg") + 30], "not a tar that can be read after clip 'clip-011'"),
        (lambda d: d[: find(d, "clip-013.json") - 512], "ends after clip 'clip-012', where its index has clip 'clip-013'"),
        (lambda d: b"no tar" * 200, "train-00001.tar: not a tar that can be read"),
        (lambda d: d[find(d, "clip-011.json") - 512 :], "there is clip 'clip-011', where its index has clip 'clip-010'"),
    ],
)  # fmt: skip
def test_damage_is_an_error_that_names_url_clip_and_member(
    folder: Path, tmp_path: Path, change: Callable[[bytearray], Any], message: str
) -> None:
    with serve(damage(folder, tmp_path, change)) as server:
        place = server.url.replace("//", "//user:secret@")
        geometry = Geometry(16, 8, 1, 5)  # all frames
        urls = [f"{place}/train-0000{n}.tar" for n in range(2)]
        workers = int(change is rename)  # in a loading process once
        stream = open_stream(urls, geometry, Augmentation(), 1, False, batch_size=2, workers=workers, pause=0.0)
        with pytest.raises(DamagedError) as caught, stream:
            keys(stream)
    assert message in str(caught.value) and f"{server.url}/train-00001.tar" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_errors_of_indexes_name_their_urls(folder: Path, tmp_path: Path) -> None:
    damage(folder, tmp_path, lambda data: None)
    with serve(tmp_path) as server:
        (tmp_path / "train-00000.parquet").write_bytes(b"nothing")
        with pytest.raises(DamagedError, match=rf"{server.url}/train-00000\.parquet"):
            open_shards(server.url, shards=2)
        (tmp_path / "train-00000.parquet").unlink()
        with pytest.raises(FileNotFoundError, match=rf"404.*{server.url}/train-00000\.parquet"):
            open_shards(server.url, shards=2)
    with pytest.raises(ValueError, match=rf"have no flow map, such as 'clip-000' in {folder}/train-00000\.tar"):
        open_shards(folder, guides=("flow",))


def test_only_what_samples_need_is_held_in_memory(folder: Path) -> None:
    index = ClipDataset([folder / "train-00000.parquet"], GEOMETRY, Augmentation(), 1, True).index
    stream = open_shards(folder, guides=("motion",))
    for number, members in stream._shards._clips(0, epoch=0):
        clip = index[number]
        assert len(members) == 3 and members.keys() < {*clip.offsets.tolist(), clip.arrays["motion"][0]}
        assert clip.arrays["motion"][0] in members


def tensors(batch: dict[str, Any], name: str = "") -> dict[str, Any]:
    """The values of nested dicts by their path."""
    pairs = [(f"{name}/{key}", value) for key, value in batch.items()]
    return {
        path: leaf
        for key, value in pairs
        for path, leaf in (tensors(value, key) if isinstance(value, dict) else {key: value}).items()
    }


@pytest.mark.parametrize("options", [{}, {"resize": False}, {"decode": False}])
@pytest.mark.parametrize("workers", [0, 1])
def test_batches_are_those_of_the_loader(folder: Path, options: dict[str, Any], workers: int) -> None:
    local = ClipDataset(sorted(folder.glob("*.parquet")), GEOMETRY, Augmentation(), 1, False, **options)
    expected = list(ClipLoader(local, 5, shuffle=False).batches(0))
    with open_shards(folder, False, batch_size=5, workers=workers, **options) as stream:
        for ours, theirs in zip(stream.batches(0), expected, strict=True):
            first, second = tensors(ours), tensors(theirs)
            assert first.keys() == second.keys()
            for name, value in first.items():
                same = torch.equal if isinstance(value, torch.Tensor) else eq
                assert same(value, second[name]), name
