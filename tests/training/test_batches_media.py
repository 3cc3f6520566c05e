"""Clips and images take turns: each step sees one of them, all of both are seen once an epoch, and a resumed run goes on."""

import numpy as np
import pytest
import torch
from training_shards import make_shard

from stm.config import Augmentation, Optimisation
from stm.data.dataset import ClipDataset
from stm.data.geometry import Geometry
from stm.data.loader import ClipLoader
from stm.distributed.process import Process
from stm.training.batches import Medium, count_media_steps, feed, feed_media, order_steps

ALONE = Process(0, 1, torch.device("cpu"))


def medium(folder, name: str, clips: int, frames: int, batch_size: int) -> Medium:
    index = make_shard(folder / name / f"{name}-00000.parquet", ["red"] * clips, prefix=name)
    dataset = ClipDataset([index], Geometry(32, 16, 1, frames, sampling="tsn"), Augmentation(), 0, True, guides=())
    return Medium(name, dataset, batch_size)


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    return [medium(folder, "clips", 10, 4, 4), medium(folder, "images", 9, 1, 3)]


def settings(**changes) -> Optimisation:
    return Optimisation.model_validate({"epochs": 2, "batch_size": 4, "warmup_epochs": 0, **changes})


def test_an_epoch_has_all_steps_of_both_in_an_order_of_its_own(media):
    assert count_media_steps(media) == 10 // 4 + 9 // 3
    orders = [order_steps(media, 5, epoch) for epoch in range(20)]
    assert all(np.bincount(order).tolist() == [2, 3] for order in orders)
    assert len({tuple(order) for order in orders}) > 3
    assert np.array_equal(order_steps(media, 5, 3), orders[3])


def test_each_step_sees_one_medium_and_no_sample_twice_an_epoch(media):
    steps = list(feed_media(media, settings(), ALONE, seed=1, workers=0)(0))
    assert len(steps) == 10
    for epoch in range(2):
        keys = [key for batch in steps[5 * epoch : 5 * epoch + 5] for key in batch["key"]]
        assert len(set(keys)) == len(keys) == 2 * 4 + 3 * 3
    shapes = {(tuple(batch["video"].shape[:2]), batch["key"][0].split("-")[0]) for batch in steps}
    assert shapes == {((4, 4), "clips"), ((3, 1), "images")}


def test_a_resumed_run_sees_the_batches_that_were_left(media):
    feed = feed_media(media, settings(), ALONE, seed=1, workers=0)
    whole = list(feed(0))
    for step in range(1, 10):
        rest = list(feed(step))
        assert [batch["key"] for batch in rest] == [batch["key"] for batch in whole[step:]]
        assert all(torch.equal(a["video"], b["video"]) for a, b in zip(rest, whole[step:], strict=True))


def test_the_passes_of_a_step_see_one_medium(media):
    images = media[1]._replace(batch_size=4)
    passes = list(feed_media([media[0], images], settings(accumulate=2), ALONE, seed=1, workers=0)(0))
    assert len(passes) == 2 * 2 * (2 + 2)
    assert all(a["video"].shape == b["video"].shape for a, b in zip(passes[::2], passes[1::2], strict=True))


def test_processes_see_together_what_one_sees(media):
    images = media[1]._replace(batch_size=2)
    both = [media[0], images]
    whole = [batch["key"] for batch in feed_media(both, settings(), ALONE, seed=3, workers=0)(0)]
    parts = [
        [
            batch["key"]
            for batch in feed_media(both, settings(), Process(r, 2, torch.device("cpu")), seed=3, workers=0)(0)
        ]
        for r in range(2)
    ]
    assert [a + b for a, b in zip(*parts, strict=True)] == whole


def test_too_few_samples_are_said_with_the_medium(media):
    with pytest.raises(
        ValueError, match=r"9 images, fewer than one batch of images\.batch_size = 16; set batch_size to 9"
    ):
        feed_media(
            [media[0], media[1]._replace(batch_size=16, key="images.batch_size")], settings(), ALONE, seed=1, workers=0
        )


@pytest.mark.parametrize("step", [0, 1, 2, 3])
def test_clips_alone_come_in_their_loader_s_order(media, step):
    clips = media[0].dataset  # ten: two batches of four an epoch
    loader = ClipLoader(clips, 4, shuffle=True, seed=1)
    expected = [batch for epoch in range(2) for batch in list(loader.batches(epoch))[:2]][step:]
    found = list(feed(clips, settings(), ALONE, 1, 0)(step))
    assert [batch["key"] for batch in found] == [batch["key"] for batch in expected]
    assert all(torch.equal(a["video"], b["video"]) for a, b in zip(found, expected, strict=True))
