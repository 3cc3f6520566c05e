"""Opened shards: what is opened, with which sizes, and that batches are those of a dataset and a loader made by hand."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from file_server import serve
from torch.utils.data import DataLoader
from training_shards import make_shard

import stm
from stm.api.shards import ShardsError
from stm.config import Augmentation
from stm.data.dataset import ClipDataset
from stm.data.geometry import Geometry
from stm.data.loader import ClipLoader, collate
from stm.storage.receipts import make_receipt
from stm.storage.tables import read_table, write_table


def equal(first: Any, second: Any) -> bool:
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[name], second[name]) for name in first)
    return torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second


def by_hand(results: Path, split: str, geometry: Geometry, train: bool = False, **options: Any) -> ClipDataset:
    indexes = sorted((results / "shards" / split).glob("*.parquet"))
    return ClipDataset(indexes, geometry, Augmentation(), 0, train, **options)


@pytest.mark.parametrize("train", [False, True])
def test_batches_are_those_of_a_dataset_and_a_loader_made_by_hand(results: Path, train: bool) -> None:
    data = stm.open_shards(results, train=train)
    dataset = by_hand(results, "train", Geometry(32, 8, 2, 6), train)
    loader = data.loader(batch_size=3)
    for epoch in range(2):  # each loop is the next epoch
        expected = list(ClipLoader(dataset, 3, shuffle=train).batches(epoch))
        batches = list(loader)
        assert len(batches) == len(expected) == len(loader) == (2 if train else 3)
        assert all(equal(a, b) for a, b in zip(batches, expected, strict=True))
    first = next(ClipLoader(dataset, 2, shuffle=False).batches())
    assert equal(data.batch(2), first)
    assert data.batch([5, 0])["key"] == ["b-001", "a-000"]


def test_plain_keywords_reach_geometry_augmentation_captions_and_dataset(results: Path) -> None:
    data = stm.open_shards(
        results,
        "test",
        train=True,
        frames=2,
        image_size=16,
        patch_size=4,
        tubelet=1,
        stride=2,
        sampling="tsn",
        augmentation={"crop": "center", "flip": False},
        captions={"count": 1},
        seed=7,
        guides=["motion"],
        repeats=2,
        classes=["red", "green"],
        text=True,
    )
    assert data.geometry == Geometry(16, 4, 1, 2, 2, "tsn")
    assert data.dataset.augmentation == Augmentation(crop="center", flip=False)
    assert (data.dataset.captions.count, data.dataset.seed, data.guides) == (1, 7, ("motion",))
    batch = data.batch(3)
    assert batch["video"].shape == (6, 2, 3, 16, 16) and batch["text"].shape == (6, 12)
    assert batch["label"].tolist() == [1, 1, 0, 0, -1, -1] and sorted(batch["guides"]) == ["motion", "noise"]


@pytest.mark.parametrize("place", ["", "shards", "shards/train"])
def test_a_dataset_its_shards_and_a_split_open_alike(results: Path, place: str) -> None:
    data = stm.open_shards(str(results / place))
    assert len(data) == 7 and data.batch(7)["key"] == [f"a-{n:03d}" for n in range(4)] + [
        f"b-{n:03d}" for n in range(3)
    ]
    assert data.labels == ["red", "green", "blue", None, "blue", "red", "red"]
    assert data.captions == [["one", "two"]] * 7 and data.classes == ["blue", "green", "red"]


def test_single_tars_lists_of_them_and_other_splits_open(results: Path) -> None:
    tars = sorted((results / "shards/train").glob("*.tar"))
    assert len(stm.open_shards(tars[0])) == 4
    assert len(stm.open_shards(tars)) == len(stm.open_shards([tar.with_suffix(".parquet") for tar in tars])) == 7
    assert len(stm.open_shards(results, "test")) == 3


def test_repr_says_what_is_in_it(results: Path) -> None:
    text = repr(stm.open_shards(results))
    for part in (
        f"7 clips in 2 shards of {results / 'shards/train'} (also there: test)",
        "6 frames of 32 x 32 pixels, 3 x 4 x 4 tokens of 2 x 8 x 8",
        "motion, motion_compensated, similarity",
        "captions  made",
        "3 classes",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, Geometry(32, 8, 2, 6)),
        ({"frames": 4}, Geometry(32, 8, 2, 4)),
        ({"frames": 3}, Geometry(32, 8, 1, 3)),
        ({"tubelet": 4}, Geometry(32, 8, 4, 4)),
        ({"image_size": 64}, Geometry(64, 16, 2, 6)),
        ({"patch_size": 12}, Geometry(24, 12, 2, 6)),
        ({"image_size": 48, "patch_size": 16}, Geometry(48, 16, 2, 6)),
    ],
)
def test_sizes_that_are_not_given_fit_the_shards(results: Path, given: dict[str, int], expected: Geometry) -> None:
    assert stm.open_shards(results, **given).geometry == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"image_size": 33}, "image_size 33 is not divisible by patch_size 8; give both"),
        ({"frames": 3, "tubelet": 2}, "frames 3 is not divisible by tubelet 2; give both"),
        ({"patch_size": 0}, "patch_size must be a positive integer, is 0"),
        ({"stride": 0}, "stride must be a positive integer, is 0"),
        ({"frames": "8"}, "frames must be a positive integer, is '8'"),
        ({"sampling": "dnse"}, "sampling must be one of dense, tsn, "),
    ],
)
def test_sizes_that_do_not_fit_are_refused(results: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ShardsError, match=message):
        stm.open_shards(results, **given)


def test_misspelt_keys_and_missing_sources_are_explained(results: Path) -> None:
    with pytest.raises(ShardsError, match=r"augmentation\.flop: no such key; did you mean `flip`"):
        stm.open_shards(results, augmentation={"flop": False})
    with pytest.raises(ShardsError, match=r"captions\.count = 0: should be greater than or equal to 1"):
        stm.open_shards(results, captions={"count": 0})
    with pytest.raises(ValueError, match="no clip has captions of people; packed sources: made"):
        stm.open_shards(results, captions={"sources": ["people"]})


def test_what_is_no_folder_of_shards_is_explained(results: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for place, split, message in (
        (tmp_path / "nothing", None, "no packed shards there: a folder, or a tar with its index"),
        (tmp_path / "empty", None, "the stage `shards` writes them to results/NAME/shards"),
        (results.parent, None, f"results of several datasets; open one: {results}"),
        (results, "val", "has no split 'val'; name one: test, train"),
        (results / "shards/test", "train", "is the folder of one split and has no split 'train'"),
        ([results / "shards/test/test-00000.tar", "https://a.example/b.tar"], None, "some are local paths"),
    ):
        with pytest.raises(ShardsError, match=message):
            stm.open_shards(place, split)  # type: ignore[arg-type]


def test_several_splits_without_train_are_to_be_named(results: Path, tmp_path: Path) -> None:
    for split in ("val", "test"):
        shutil.copytree(results / "shards/test", tmp_path / "shards" / split)
    with pytest.raises(ShardsError, match="has several splits; name one: test, val"):
        stm.open_shards(tmp_path)
    assert len(stm.open_shards(tmp_path, "val")) == 3


def test_the_frames_of_an_earlier_stage_are_not_taken_for_shards(results: Path, tmp_path: Path) -> None:
    shutil.copytree(results / "shards/test", tmp_path / "frames")
    index = tmp_path / "frames/test-00000.parquet"
    write_table(index, read_table(index), make_receipt("frames", {}))
    with pytest.raises(ShardsError, match="was written by the stage `frames`"):
        stm.open_shards(tmp_path / "frames")


def test_clips_that_do_not_exist_are_refused(results: Path) -> None:
    data = stm.open_shards(results, "test")
    for clips in (4, 0, [3], [-1], []):
        with pytest.raises(ShardsError, match="there are 3 clips, with numbers from 0 to 2"):
            data.batch(clips)
    with pytest.raises(ShardsError, match="batch_size must be a positive integer, is 0"):
        data.loader(0)
    with pytest.raises(ShardsError, match="name at least one tar"):
        stm.open_shards([])


def test_torchs_own_loader_reads_the_dataset_in_spawned_workers(results: Path) -> None:
    data = stm.open_shards(results, "test")
    loader = DataLoader(data.dataset, 3, num_workers=1, multiprocessing_context="spawn", collate_fn=collate)
    assert torch.equal(next(iter(loader))["video"], data.batch(3)["video"])
    assert data.dataset[-1][0]["key"] == data.dataset[2][0]["key"]


def test_one_frame_per_clip_is_one_slot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training_shards.FRAMES", 1)
    make_shard(tmp_path / "shards/train/train-00000.parquet", ["red", "blue"])
    assert stm.open_shards(tmp_path).batch(2)["video"].shape == (2, 1, 3, 32, 32)


def test_shards_at_urls_give_the_batches_of_local_ones(results: Path) -> None:
    local = stm.open_shards(results)
    with serve(results / "shards/train") as server:
        data = stm.open_shards(f"{server.url}/train-{{00000..00001}}.tar", attempts=1)
        assert len(data) == 7 and data.geometry == local.geometry and data.labels == local.labels
        assert equal(data.batch(3), local.batch(3))
        loader, own = data.loader(batch_size=3), local.loader(batch_size=3)
        assert len(loader) == len(own) == 3
        for _ in range(2):  # each loop is an epoch
            assert all(equal(a, b) for a, b in zip(loader, own, strict=True))
        with pytest.raises(ShardsError, match="read from start to end, not clip by clip"):
            data.dataset  # noqa: B018
        with pytest.raises(ShardsError, match="give a number of clips"):
            data.batch([1, 2])
        with pytest.raises(ShardsError, match="there are 7 clips"):
            data.batch(8)
        with pytest.raises(ShardsError, match="shuffled if opened with train=True"):
            data.loader(shuffle=True)
    assert f"7 clips in {server.url}" in repr(data) and os.fspath(results) not in repr(data)
