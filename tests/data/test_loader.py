"""Order, sharding and resume of loading."""

from collections.abc import Callable
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from stm.config import Augmentation
from stm.data.dataset import ClipDataset
from stm.data.geometry import Geometry
from stm.data.loader import ClipLoader, move, move_ahead, permute
from stm.data.loading_processes import share

GEOMETRY = Geometry(image_size=16, patch_size=8, tubelet=2, frames=2)


@pytest.fixture
def data(tmp_path: Path, shard: Callable, clip: Callable) -> ClipDataset:
    clips = [clip(n, frames=3, width=20, height=16) for n in range(11)]
    paths = [shard(tmp_path / f"train-{n:05d}.parquet", clips[n::2]) for n in range(2)]
    return ClipDataset(paths, GEOMETRY, Augmentation(), seed=1, train=True, repeats=2)


def keys(loader: ClipLoader, epoch: int = 0, start: int = 0) -> list[list[str]]:
    return [batch["key"] for batch in loader.batches(epoch, start)]


def equal(first: Any, second: Any) -> bool:
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[name], second[name]) for name in first)
    return torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second


def test_a_batch_has_the_shapes_of_the_contract(data: ClipDataset) -> None:
    batch = next(ClipLoader(data, 3, shuffle=True).batches())
    assert batch["video"].shape == (6, 2, 3, 16, 16) and batch["video"].dtype == torch.uint8
    for guide in ("noise", "similarity", "motion"):
        assert batch["guides"][guide].shape == (6, 1, 4) and batch["guides"][guide].dtype == torch.float32
    assert batch["label"].dtype == torch.int64 and batch["view"].tolist() == [0, 1] * 3
    assert len(batch["key"]) == len(batch["caption"]) == 6
    assert batch["key"][0] == batch["key"][1] != batch["key"][2]  # repeats lie side by side


def test_an_epoch_is_a_permutation_that_depends_on_seed_and_epoch() -> None:
    first = permute(100, 0, 0)
    assert sorted(first.tolist()) == list(range(100))
    assert permute(100, 0, 0).tolist() == first.tolist()
    assert permute(100, 0, 1).tolist() != first.tolist() != permute(100, 1, 0).tolist()


def test_shuffled_batches_are_full_and_take_each_clip_at_most_once(data: ClipDataset) -> None:
    loader = ClipLoader(data, 3, shuffle=True, seed=5)
    batches = keys(loader)
    assert len(loader) == len(batches) == 3 and loader.clips_per_epoch == 9
    seen = [key for batch in batches for key in batch[::2]]
    assert len(set(seen)) == 9


def test_evaluation_takes_every_clip_once_in_order(data: ClipDataset) -> None:
    loader = ClipLoader(data, 4, shuffle=False)
    seen = [key for batch in keys(loader) for key in batch[::2]]
    assert len(loader) == 3 and seen == [data.index[n].key for n in range(11)]


@pytest.mark.parametrize("start", [0, 3, 6])
def test_a_resumed_epoch_goes_on_with_exactly_the_batches_left(data: ClipDataset, start: int) -> None:
    whole = list(ClipLoader(data, 3, shuffle=True, seed=5).batches(epoch=2))
    rest = list(ClipLoader(data, 3, shuffle=True, seed=5).batches(epoch=2, start=start))
    assert len(rest) == 3 - start // 3
    assert all(equal(a, b) for a, b in zip(whole[start // 3 :], rest, strict=True))


def test_worker_processes_change_nothing(data: ClipDataset) -> None:
    expected = [list(ClipLoader(data, 3, shuffle=True).batches(epoch)) for epoch in range(2)]
    loader = ClipLoader(data, 3, shuffle=True, workers=2)
    next(loader.batches(epoch=7))  # left unfinished, as by a run that stops
    for epoch in range(2):
        assert all(equal(a, b) for a, b in zip(loader.batches(epoch), expected[epoch], strict=True))


def test_worker_processes_change_nothing_in_augmented_samples(tmp_path: Path, shard: Callable, clip: Callable) -> None:
    text = np.eye(3, 5, dtype=np.float16)
    flow = np.random.default_rng(0).normal(size=(2, 9, 8, 10, 2)).astype(np.float16)
    path = shard(tmp_path / "a.parquet", [clip(n, frames=9, text=text, flow=flow) for n in range(6)])
    augmentation = Augmentation(crop="random_resized", auto_augment="rand-m7-n4-mstd0.5-inc1", erasing=0.5)
    geometry = Geometry(32, 8, 2, 4, 1, "tsn")
    data = ClipDataset([path], geometry, augmentation, 1, True, repeats=2, text=True)
    expected = list(ClipLoader(data, 2, shuffle=True).batches(epoch=3))
    assert expected[0]["text"].shape == (4, 5) and expected[0]["guides"]["flow"].shape == (4, 2, 4, 8, 8, 2)
    assert expected[0]["caption_index"].dtype == torch.int64
    for workers in (1, 2):
        loaded = ClipLoader(data, 2, shuffle=True, workers=workers).batches(epoch=3)
        assert all(equal(a, b) for a, b in zip(loaded, expected, strict=True))


def test_processes_take_together_what_one_would(data: ClipDataset) -> None:
    alone = keys(ClipLoader(data, 4, shuffle=True, seed=5), epoch=1)
    parts = [keys(ClipLoader(data, 2, shuffle=True, seed=5, rank=r, processes=2), epoch=1) for r in (0, 1)]
    assert [first + second for first, second in zip(*parts, strict=True)] == alone


def test_paired_clips_are_in_one_process_at_mirrored_places(data: ClipDataset) -> None:
    alone = keys(ClipLoader(data, 8, shuffle=True, seed=5), epoch=1)
    parts = [keys(ClipLoader(data, 4, shuffle=True, seed=5, rank=r, processes=2, paired=True), epoch=1) for r in (0, 1)]
    for step, *own in zip(alone, *parts, strict=True):
        partner = dict(zip(step, reversed(step), strict=True))
        assert sorted(own[0] + own[1]) == sorted(step)
        for batch in own:
            assert [partner[key] for key in batch] == list(reversed(batch))


def test_processes_share_the_last_clips_in_evaluation(data: ClipDataset) -> None:
    parts = [keys(ClipLoader(data, 4, shuffle=False, rank=r, processes=2)) for r in (0, 1)]
    seen = [key for part in parts for batch in part for key in batch[::2]]
    assert sorted(seen) == sorted(data.index[n].key for n in range(11))


class Numbers:
    """A data set of so many clips whose samples say which clip they are."""

    def __init__(self, clips: int) -> None:
        self.clips = clips

    def __len__(self) -> int:
        return self.clips

    def __getitem__(self, item: tuple[int, int]) -> list[dict[str, Any]]:
        epoch, clip = item
        integers = {"label": 0, "clip": clip, "view": 0, "caption_index": -1}
        pixels = np.zeros((1, 3, 1, 1), np.uint8)
        return [{"video": pixels, "guides": {}, **integers, "key": f"{epoch}/{clip}", "caption": ""}]


def deal(clips: int, batch_size: int, processes: int, *, start: int = 0, **settings: Any) -> list[list[list[str]]]:
    """Keys of each process's batches in epoch 2, by process."""
    loaders = [
        ClipLoader(Numbers(clips), batch_size, rank=rank, processes=processes, **settings)  # type: ignore[arg-type]
        for rank in range(processes)
    ]
    dealt = [keys(loader, 2, start) for loader in loaders]
    assert start or [len(batches) for batches in dealt] == [len(loader) for loader in loaders]
    return dealt


def in_order(dealt: list[list[list[str]]]) -> list[str]:
    """Step after step, and in a step process after process."""
    return [key for step in zip_longest(*dealt, fillvalue=[]) for batch in step for key in batch]


COUNTS = {"clips": st.integers(1, 40), "batch_size": st.integers(1, 7), "processes": st.integers(1, 5)}


@settings(max_examples=150, deadline=None)
@given(**COUNTS, seed=st.integers(0, 3), steps=st.integers(0, 4))
def test_training_sees_each_clip_once_but_for_a_rest_smaller_than_a_batch(
    clips: int, batch_size: int, processes: int, seed: int, steps: int
) -> None:
    step = batch_size * processes
    assume(clips >= step)
    dealt = deal(clips, batch_size, processes, shuffle=True, seed=seed)
    whole = [f"2/{clip}" for clip in permute(clips, seed, 2)]
    assert in_order(dealt) == whole[: clips // step * step]  # hence none twice, and clips % step left out
    assert {len(batch) for batches in dealt for batch in batches} == {batch_size}
    rest = deal(clips, batch_size, processes, shuffle=True, seed=seed, start=steps * step)
    assert rest == [batches[steps:] for batches in dealt]


@settings(max_examples=100, deadline=None)
@given(**COUNTS)
def test_evaluation_sees_each_clip_once_and_leaves_out_none(clips: int, batch_size: int, processes: int) -> None:
    dealt = deal(clips, batch_size, processes, shuffle=False)
    assert in_order(dealt) == [f"2/{clip}" for clip in range(clips)]


@pytest.mark.parametrize(("clips", "batch_size", "processes"), [(13, 2, 3), (9, 4, 1), (5, 1, 2)])
def test_no_number_of_workers_changes_the_order(clips: int, batch_size: int, processes: int) -> None:
    expected = deal(clips, batch_size, processes, shuffle=True, drop_last=False)
    assert len(in_order(expected)) == clips
    for workers in (1, 3):
        assert deal(clips, batch_size, processes, shuffle=True, drop_last=False, workers=workers) == expected


def test_how_clips_are_cut_into_shards_changes_nothing(tmp_path: Path, shard: Callable, clip: Callable) -> None:
    clips, found = [clip(n, frames=3, width=20, height=16) for n in range(7)], []
    for number, cuts in enumerate([(), (1,), (3, 5), range(1, 7)]):
        parts = [clips[a:b] for a, b in pairwise([0, *cuts, 7])]
        paths = [shard(tmp_path / f"{number}" / f"train-{n:05d}.parquet", part) for n, part in enumerate(parts)]
        data = ClipDataset(paths, GEOMETRY, Augmentation(), seed=1, train=True)
        found.append(list(ClipLoader(data, 2, shuffle=True, seed=4, drop_last=False).batches(epoch=1)))
    assert sorted(key for batch in found[0] for key in batch["key"]) == [c["key"] for c in clips]
    for other in found[1:]:
        assert all(equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_loading_leaves_the_global_random_state_alone(data: ClipDataset) -> None:
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    list(ClipLoader(data, 3, shuffle=True).batches())
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)  # noqa: NPY002


def test_fewer_clips_than_a_batch_is_an_error_in_training_only(data: ClipDataset) -> None:
    with pytest.raises(ValueError, match=r"11 clips, and one batch takes 12 \(2 processes x 6\)"):
        ClipLoader(data, 6, shuffle=True, processes=2)
    assert len(list(ClipLoader(data, 12, shuffle=False).batches())) == 1
    assert len(list(ClipLoader(data, 12, shuffle=True, drop_last=False).batches())) == 1


def test_move_keeps_what_is_no_tensor(data: ClipDataset) -> None:
    batch = next(ClipLoader(data, 2, shuffle=False).batches())
    moved = move(batch, "meta")
    assert moved["video"].device.type == moved["guides"]["noise"].device.type == "meta"
    assert moved["key"] == batch["key"]


def test_moving_ahead_changes_no_batch_and_no_order(data: ClipDataset) -> None:
    loader = ClipLoader(data, 3, shuffle=True, seed=5)
    plain = list(loader.batches(1))
    assert len(plain) == 3
    assert all(map(equal, move_ahead(loader.batches(1), torch.device("cpu")), plain))


@pytest.mark.cuda
def test_moving_ahead_gives_the_device_the_same_batches(data: ClipDataset) -> None:
    loader = ClipLoader(data, 3, shuffle=True, seed=5)
    moved = move_ahead(loader.batches(1), torch.device("cuda"))
    assert all(equal(a, move(b, "cuda")) for a, b in zip(moved, loader.batches(1), strict=True))


@pytest.mark.parametrize(
    ("message", "kind", "text"),
    [
        (
            "unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)",
            MemoryError,
            "is full",
        ),
        ("unable to resize file </torch_1> to the right size: No space left on device (28)", MemoryError, "--shm-size"),
        (
            "unable to open shared memory object </torch_1> in read-write mode: Too many open files (24)",
            OSError,
            "Too many",
        ),
        ("unable to resize file </torch_1> to the right size: Input/output error (5)", OSError, "/dev/shm: unable to"),
        ("some other error", RuntimeError, "some other error"),
    ],
)
def test_only_a_full_shared_memory_is_called_full(
    message: str, kind: type[Exception], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(tensor: torch.Tensor) -> torch.Tensor:
        raise RuntimeError(message)

    monkeypatch.setattr(torch.utils.data, "get_worker_info", lambda: "a loading process")
    monkeypatch.setattr(torch.Tensor, "share_memory_", fail)
    with pytest.raises(kind, match=text) as caught:
        share(torch.zeros(3))
    assert kind is MemoryError or "is full" not in str(caught.value)
