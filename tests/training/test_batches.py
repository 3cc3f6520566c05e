"""What a run is fed: whatever the counts, each sample once an epoch, in one order, and from any step on."""

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from training_shards import make_shard

from stm.config import Optimisation
from stm.data.loader import Batch, permute
from stm.distributed.process import Process
from stm.storage.files import sha256_file
from stm.training.batches import Medium, feed, feed_media, hash_shards, order_steps

EPOCHS = 2
CPU = torch.device("cpu")


class Numbers:
    """A data set of so many clips, each with so many views, whose samples say which they are."""

    def __init__(self, clips: int, repeats: int, name: str = "") -> None:
        self.clips, self.samples_per_clip, self.name = clips, repeats, name

    def __len__(self) -> int:
        return self.clips

    def __getitem__(self, item: tuple[int, int]) -> list[dict[str, Any]]:
        epoch, clip = item
        sample = {"label": 0, "clip": clip, "caption_index": -1, "caption": "", "guides": {}}
        sample |= {"video": np.zeros((1, 3, 1, 1), np.uint8), "key": f"{self.name}{epoch}/{clip}"}
        return [{**sample, "view": view} for view in range(self.samples_per_clip)]


def read(feeds: list[Callable[[int], Iterator[Batch]]], passes: int, step: int = 0) -> list[list[str]]:
    """Keys of each step's samples: pass after pass, and in a pass process after process."""
    streams = [(batch["key"] for batch in batches(step)) for batches in feeds]
    steps = []
    while taken := [keys for _ in range(passes) for stream in streams for keys in islice(stream, 1)]:
        assert len(taken) == passes * len(feeds)  # no process has fewer steps than another: it would wait for ever
        steps.append([key for keys in taken for key in keys])
    return steps


def processes(count: int) -> list[Process]:
    return [Process(rank, count, CPU) for rank in range(count)]


def settings_of(batch_size: int, passes: int) -> Optimisation:
    return Optimisation(epochs=EPOCHS, warmup_epochs=0, batch_size=batch_size, accumulate=passes)


PARTS = {"passes": st.integers(1, 3), "count": st.integers(1, 4), "resume": st.integers(0, 5)}


@settings(max_examples=100, deadline=None)
@given(clips=st.integers(1, 60), each=st.integers(1, 3), repeats=st.integers(1, 3), **PARTS)
def test_an_epoch_is_the_shuffled_clips_less_a_rest_smaller_than_a_batch(
    clips: int, each: int, repeats: int, passes: int, count: int, resume: int
) -> None:
    """`each`: clips of one process in one pass."""
    together = each * passes * count  # clips of a step
    assume(clips >= together)
    per_epoch, wanted = clips // together, settings_of(together * repeats, passes)
    data: Any = Numbers(clips, repeats)
    feeds = [feed(data, wanted, process, 5, 0) for process in processes(count)]
    steps = read(feeds, passes)
    assert len(steps) == EPOCHS * per_epoch
    for epoch in range(EPOCHS):
        seen = [key for step in steps[epoch * per_epoch :][:per_epoch] for key in step]
        whole = permute(clips, 5, epoch)[: per_epoch * together]
        assert seen == [f"{epoch}/{clip}" for clip in whole for _ in range(repeats)]
    assert read(feeds, passes, resume) == steps[resume:]


@settings(max_examples=60, deadline=None)
@given(sizes=st.tuples(st.integers(1, 40), st.integers(1, 40)), each=st.tuples(*[st.integers(1, 2)] * 2), **PARTS)
def test_each_of_several_media_is_seen_once_an_epoch(
    sizes: tuple[int, int], each: tuple[int, int], passes: int, count: int, resume: int
) -> None:
    batches = [n * passes * count for n in each]
    assume(all(size >= batch for size, batch in zip(sizes, batches, strict=True)))
    data: list[Any] = [Numbers(size, 1, name) for size, name in zip(sizes, "ab", strict=True)]
    media = [Medium(d.name, d, batch) for d, batch in zip(data, batches, strict=True)]
    wanted = settings_of(batches[0], passes)
    feeds = [feed_media(media, wanted, process, 5, 0) for process in processes(count)]
    steps, per_epoch = read(feeds, passes), sum(medium.steps for medium in media)
    assert [step[0][0] for step in steps] == ["ab"[n] for epoch in range(EPOCHS) for n in order_steps(media, 5, epoch)]
    for epoch in range(EPOCHS):
        seen = [key for step in steps[epoch * per_epoch :][:per_epoch] for key in step]
        for size, medium in zip(sizes, media, strict=True):
            own = [key for key in seen if key.startswith(medium.name)]
            whole = permute(size, 5, epoch)[: medium.steps * medium.batch_size]
            assert own == [f"{medium.name}{epoch}/{clip}" for clip in whole]
    assert read(feeds, passes, resume) == steps[resume:]


def test_shards_of_two_datasets_are_told_apart_although_their_names_are_the_same(tmp_path: Path) -> None:
    videos, images = (
        make_shard(tmp_path / name / "train" / "train-00000.parquet", ["red"] * clips)
        for name, clips in (("videos", 2), ("images", 3))
    )
    tars = [sha256_file(index.with_suffix(".tar")) for index in (videos, images)]
    assert hash_shards([videos, images]) == {"train-00000": tars[0], "train-00000 (2)": tars[1]}
    assert hash_shards([images, videos]) != hash_shards([videos, images])
