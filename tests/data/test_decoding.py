"""JPEGs that the device decodes, and the memory in which batches reach it."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from reference_shards import same
from simplejpeg import encode_jpeg

from stm.config import Augmentation
from stm.data import decoding
from stm.data.batch_memory import BatchMemory, Parcel, Received, receive
from stm.data.geometry import Geometry
from stm.data.loader import ClipLoader, collate, move_ahead

CPU = torch.device("cpu")


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_that_a_cpu_decodes_as_the_device_are_those_of_its_resizing(open_clips: Callable, workers: int) -> None:
    settings: dict[str, Any] = {"batch_size": 3, "shuffle": True}
    with ClipLoader(open_clips(decode=False), **settings, workers=workers) as decoding_later:
        for epoch in range(4):
            loaded = list(ClipLoader(open_clips(), **settings).batches(epoch))
            decoded = list(move_ahead(decoding_later.batches(epoch), CPU))
            resized = list(move_ahead(ClipLoader(open_clips(resize=False), **settings).batches(epoch), CPU))
            assert all(map(same, decoded, resized))  # both decoders are libjpeg-turbo
            for expected, found in zip(loaded, decoded, strict=True):
                video, wanted = found.pop("video"), expected.pop("video")
                assert same(found, expected)
                assert video.shape == (6, 4, 3, 32, 32) and video.dtype == torch.uint8
                assert (video.int() - wanted.int()).abs().max() <= 1


def test_images_and_evaluation_s_crops_are_decoded_alike(open_clips: Callable) -> None:
    bicubic = Augmentation(crop="whole", interpolation="bicubic")
    for changes in (
        {"geometry": Geometry(32, 8, 1, 1)},
        {"train": False, "crops": 3, "views": 2},
        {"train": False, "whole": True, "augmentation": bicubic},
    ):
        data, other = open_clips(**changes), open_clips(**changes, decode=False)
        for number in range(len(data)):
            video = decoding.decode_batch(collate([other[number]]), CPU)["video"]
            assert (video.int() - collate([data[number]])["video"].int()).abs().max() <= 1


def test_frames_that_samples_share_are_decoded_once(open_clips: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    decode = torchvision.io.decode_jpeg
    monkeypatch.setattr(
        torchvision.io, "decode_jpeg", lambda jpegs, **rest: counts.append(len(jpegs)) or decode(jpegs, **rest)
    )
    data = open_clips(decode=False, repeats=4)
    batch = collate([data[number] for number in range(6)])
    assert decoding.decode_batch(batch, CPU)["video"].shape[:2] == (6 * 4, 4)
    assert counts == [
        2 * (4 + 4 + 2)
    ]  # the short clips have two frames in reach, 2 apart, of which the last is repeated


def test_repeats_decode_each_frame_once_in_the_loader(open_clips: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    data, read = open_clips(repeats=4), []
    decode = type(data._reader)._decode
    monkeypatch.setattr(type(data._reader), "_decode", lambda *a: read.append(a[2]) or decode(*a))
    assert len(data[0]) == 4 and len(read) == len(set(read)) == 4


def test_what_cannot_be_decoded_names_its_clips_and_the_way_out(open_clips: Callable) -> None:
    data = open_clips(decode=False, repeats=1)
    batch = collate([data[0], data[1]])
    batch["jpegs"]["data"][:] = 7
    with pytest.raises(
        ValueError, match=r"clips clip-000, clip-001 cannot be decoded on cpu: .* Set decode_on to loader"
    ):
        decoding.decode_batch(batch, CPU)
    (sample,) = data[0]
    sample["jpegs"] = [memoryview(encode_jpeg(np.zeros((16, 24, 3), np.uint8)))] * 4
    with pytest.raises(ValueError, match="a frame of clip 'clip-000' is not 80x64 pixels as in the index"):
        decoding.decode_batch(collate([[sample]]), CPU)


@pytest.mark.parametrize("late", [{"erasing": 0.5}, {"auto_augment": "rand-m7-n4-mstd0.5-inc1"}])
def test_what_changes_resized_pixels_is_refused(open_clips: Callable, late: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"augmentation: {next(iter(late))} operate"):
        open_clips(augmentation=Augmentation(**late), decode=False)


@pytest.mark.cuda
def test_cuda_decodes_nearly_as_a_cpu_does(open_clips: Callable) -> None:
    data = open_clips(decode=False)
    batch = collate([data[number] for number in range(6)])
    on_cuda, on_cpu = (
        decoding.decode_batch(batch, torch.device(name))["video"].cpu().int() for name in ("cuda", "cpu")
    )
    assert (on_cuda - on_cpu).abs().float().mean() < 3


@pytest.mark.parametrize("pixels", [{}, {"resize": False}, {"decode": False}])
def test_batches_that_are_kept_are_not_overwritten(open_clips: Callable, pixels: dict[str, bool]) -> None:
    data = open_clips(**pixels)
    expected = [batch for epoch in range(4) for batch in ClipLoader(data, 1, shuffle=True).batches(epoch)]
    with ClipLoader(data, 1, shuffle=True, workers=1) as loader:
        next(loader.batches(7))  # left unfinished: its batches are thrown away
        found = [batch for epoch in range(4) for batch in loader.batches(epoch)]
    assert len(found) == 24 and all(map(same, found, expected))


@pytest.fixture
def in_a_loading_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.utils.data, "get_worker_info", lambda: "a loading process")


def send(memory: BatchMemory, value: int) -> Received:
    """A batch of two videos, as the training process gets it."""
    arena = memory.open()
    videos = [arena.allocate((1, 3, 2, 2)) for _ in range(2)]
    for video in videos:
        video[...] = value
    parcel = arena.hand_over(arena.join(videos))
    memory.close(arena)
    if isinstance(parcel, torch.Tensor):
        assert parcel.is_shared() and parcel.unique().tolist() == [value]
        return Received(torch.zeros(1), (0,))
    kind, arguments = parcel.__reduce__()
    return kind(*arguments)


@pytest.mark.usefixtures("in_a_loading_process")
def test_shared_memory_is_used_again_once_its_batch_is_copied_and_not_before() -> None:
    memory = BatchMemory()
    send(memory, 1)  # its size is not known yet: a tensor of its own
    first, second = send(memory, 2), send(memory, 3)
    assert len(memory._slots) == 2
    received = receive({"crops": {"pixels": first}, "key": ["a"]})
    assert received["key"] == ["a"] and torch.equal(received["crops"]["pixels"], first.copy())
    assert first.copy().unique().tolist() == [2] and second.copy().shape == (2, 1, 3, 2, 2)
    del first
    third = send(memory, 4)
    assert len(memory._slots) == 2
    assert third.copy().unique().tolist() == [4] and second.copy().unique().tolist() == [3]


@pytest.mark.usefixtures("in_a_loading_process")
def test_a_larger_batch_than_so_far_gets_memory_of_its_own() -> None:
    memory = BatchMemory()
    send(memory, 1)
    arena = memory.open()
    large = [arena.allocate((2, 3, 4, 4)) for _ in range(2)]
    joined = arena.join(large)
    assert joined.shape == (2, 2, 3, 4, 4) and isinstance(arena.hand_over(joined), torch.Tensor)
    memory.close(arena)
    arena = memory.open()
    assert isinstance(arena.hand_over(arena.allocate((2, 2, 3, 4, 4))), Parcel)


def test_what_was_not_allocated_in_order_is_stacked() -> None:
    memory = BatchMemory()
    memory.close(first := memory.open())
    first.allocate((10,))
    memory.close(first)
    arena = memory.open()
    one, other = arena.allocate((4,)), arena.allocate((4,))
    one[...], other[...] = 1, 2
    assert arena.join([one, other]).base is not None  # a view
    assert arena.join([other, one]).tolist() == [[2] * 4, [1] * 4]
    assert arena.join([one, np.full(4, 5, np.uint8)]).tolist() == [[1] * 4, [5] * 4]
