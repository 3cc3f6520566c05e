"""Samples: pixels and guides of one crop, from one seed."""

import copy
import dataclasses
import errno
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg

from stm.config import Augmentation
from stm.data.crop_boxes import draw_crop
from stm.data.dataset import ClipDataset, make_generator
from stm.data.geometry import Geometry
from stm.shards import reader

GEOMETRY = Geometry(image_size=32, patch_size=8, tubelet=2, frames=4, stride=2)


@pytest.fixture
def open_clips(tmp_path: Path, shard: Callable, clip: Callable) -> Callable[..., ClipDataset]:
    """Opens a data set of the given clips, or of three."""

    def build(clips: list[dict] | None = None, **changes: Any) -> ClipDataset:
        path = shard(tmp_path / "train-00000.parquet", clips or [clip(0), clip(1), clip(2)])
        arguments: dict[str, Any] = {
            "geometry": GEOMETRY,
            "augmentation": Augmentation(),
            "seed": 3,
            "train": True,
        } | changes
        return ClipDataset([path], **arguments)

    return build


def same(first: Any, second: Any) -> bool:
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[name], second[name]) for name in first)
    if isinstance(first, list):
        return len(first) == len(second) and all(same(a, b) for a, b in zip(first, second, strict=True))
    return np.array_equal(first, second) if isinstance(first, np.ndarray) else first == second


def test_a_sample_has_the_shapes_of_the_contract(open_clips: Callable) -> None:
    (sample,) = open_clips()[0]
    assert sample["video"].shape == (4, 3, 32, 32) and sample["video"].dtype == np.uint8
    assert set(sample["guides"]) == {"noise", "similarity", "motion", "motion_compensated"}
    for values in sample["guides"].values():
        assert values.shape == (2, 16) and values.dtype == np.float32
    assert sample["guides"]["noise"].min() >= 0 and sample["guides"]["noise"].max() < 1
    assert (sample["label"], sample["key"], sample["clip"], sample["view"]) == (0, "clip-000", 0, 0)


def test_a_sample_depends_on_seed_epoch_and_key_alone(open_clips: Callable, clip: Callable) -> None:
    data = open_clips()
    wanted = data[5, 1]
    assert not same(data[6, 1], wanted)
    data.set_epoch(5)
    assert same(data[1], wanted)
    other = open_clips([clip(n) for n in (1, 7, 9)], classes=["a", "b"])  # other company: clip 1 is first now
    (alone,) = other[5, 0]
    assert same({**alone, "clip": 1}, wanted[0])
    assert not same(open_clips(seed=4)[5, 1], wanted)


def test_a_data_set_survives_the_way_to_a_worker_process(open_clips: Callable) -> None:
    data = open_clips()
    before = data[0, 2]
    assert same(copy.deepcopy(data)[0, 2][0], before[0])


def test_repeats_share_the_frames_and_differ_in_all_else(open_clips: Callable) -> None:
    samples = open_clips(repeats=3)[0]
    assert [sample["view"] for sample in samples] == [0, 1, 2]
    red = [sample["video"][:, 0].mean(axis=(1, 2)) for sample in samples]  # tells the frame, whatever the crop
    np.testing.assert_allclose(red[1], red[0], atol=1.5)
    np.testing.assert_allclose(red[2], red[0], atol=1.5)
    assert not same(samples[0]["guides"]["noise"], samples[1]["guides"]["noise"])
    assert not same(samples[1]["guides"]["noise"], samples[2]["guides"]["noise"])
    (single,) = open_clips()[0]
    assert same(single, samples[0])


def test_the_window_is_the_clip_s_own_and_moves_with_the_epoch(open_clips: Callable) -> None:
    data = open_clips()
    starts = set()
    for epoch in range(60):
        red = data[epoch, 0][0]["video"][:, 0].mean(axis=(1, 2))
        frames = np.rint((red - 10) / 5).astype(int)  # see make_frames
        assert frames.tolist() == list(range(frames[0], frames[0] + 8, 2))
        starts.add(int(frames[0]))
    assert starts == set(range(12 - 4 * 2 + 1))


def test_a_short_clip_repeats_its_last_frame(open_clips: Callable, clip: Callable) -> None:
    (sample,) = open_clips([clip(0, frames=4)])[0]
    red = sample["video"][:, 0].mean(axis=(1, 2))
    np.testing.assert_allclose(red, [10, 20, 20, 20], atol=1.5)


@pytest.mark.parametrize("crop", ["multi_scale", "random_resized", "center"])
def test_guides_follow_the_pixels_through_crop_and_flip(open_clips: Callable, clip: Callable, crop: str) -> None:
    """Maps that hold each cell's brightness must stay the tokens' brightness, wherever the crop falls."""
    rows, columns, cell = 8, 10, 16
    cells = np.random.default_rng(0).integers(20, 230, (12, rows, columns))
    pixels = cells.repeat(cell, axis=1).repeat(cell, axis=2)
    video = np.repeat(pixels[..., None], 3, axis=3).astype(np.uint8)
    maps = {
        "similarity": (cells / 256).astype(np.float16)[None].repeat(3, axis=0),
        "motion": np.stack([cells / 256, cells * 0, cells * 0], axis=-1).astype(np.float16),
    }
    content = {"video": video, "width": columns * cell, "height": rows * cell, "rows": rows, "columns": columns, **maps}
    geometry = Geometry(image_size=64, patch_size=16, tubelet=2, frames=4, stride=1)
    augmentation = Augmentation.model_validate({"crop": crop, "scale": (0.2, 1)})
    data = open_clips([clip(0, **content)], geometry=geometry, augmentation=augmentation)
    flipped = set()
    for epoch in range(25):
        (sample,) = data[epoch, 0]
        tokens = sample["video"].astype(float).mean(axis=1).reshape(2, 2, 4, 16, 4, 16).mean(axis=(1, 3, 5)) / 256
        for guide in ("similarity", "motion"):
            np.testing.assert_allclose(sample["guides"][guide].reshape(2, 4, 4), tokens, atol=0.03)
        flipped.add(draw_crop(make_generator(3, epoch, "clip-000", 0), augmentation, 160, 128)[1])
    assert flipped == {True, False}


def test_similarity_is_that_of_the_sampled_caption(open_clips: Callable, clip: Callable) -> None:
    captions = ["zero", "one", "two"]
    similarity = np.arange(3, dtype=np.float16)[:, None, None, None] * np.ones((3, 12, 4, 5), dtype=np.float16)
    data = open_clips([clip(0, captions=captions, similarity=similarity)])
    seen = set()
    for epoch in range(30):
        (sample,) = data[epoch, 0]
        np.testing.assert_allclose(sample["guides"]["similarity"], captions.index(sample["caption"]), atol=1e-5)
        seen.add(sample["caption"])
    assert seen == set(captions)


def test_guides_take_the_frames_that_the_pixels_take(open_clips: Callable, clip: Callable) -> None:
    frames = np.arange(12, dtype=np.float16)[:, None, None] * np.ones((12, 4, 5), dtype=np.float16)
    content = {"similarity": frames[None].repeat(3, axis=0), "motion": np.stack([frames] * 3, axis=-1)}
    data = open_clips([clip(0, **content)])
    for epoch in range(20):
        (sample,) = data[epoch, 0]
        taken = np.rint((sample["video"][:, 0].mean(axis=(1, 2)) - 10) / 5)
        slots = taken.reshape(2, 2).mean(axis=1)[:, None].repeat(16, axis=1)
        np.testing.assert_allclose(sample["guides"]["similarity"], slots, atol=1e-5)
        steps = (
            np.where(taken > 0, taken - 0.5, 0).reshape(2, 2).mean(axis=1)[:, None]
        )  # mean of 2 steps; 1 at the start
        np.testing.assert_allclose(sample["guides"]["motion"], steps.repeat(16, axis=1), atol=1e-5)


def test_evaluation_gives_central_crops_without_flip_and_even_views(open_clips: Callable) -> None:
    data = open_clips(train=False, views=3)
    samples = data[0]
    assert data.samples_per_clip == 3 and [sample["view"] for sample in samples] == [0, 1, 2]
    starts = [(sample["video"][0, 0].mean() - 10) / 5 for sample in samples]
    np.testing.assert_allclose(starts, [0, 2, 4], atol=0.3)  # of frames 0, 2 ... 10, four from the 0th to the 2nd
    for sample in samples:
        green = sample["video"][0, 1].astype(float)
        assert (np.diff(green.mean(axis=0)) > 0).all()  # left to right, as stored
        np.testing.assert_allclose(green.mean(), 40 + 150 * 0.5, atol=1.5)  # the middle


def test_evaluation_on_the_whole_frame_squashes_it(open_clips: Callable) -> None:
    """The shard's green rises from the left border to the right one; a centred square lacks both ends."""
    (whole,), (centre,) = open_clips(train=False, whole=True)[0], open_clips(train=False)[0]
    assert whole["video"].shape == centre["video"].shape
    spans = [np.ptp(sample["video"][0, 1].astype(float).mean(axis=0)) for sample in (whole, centre)]
    assert spans[0] > spans[1] + 10
    np.testing.assert_allclose(whole["video"][0, 1].mean(), centre["video"][0, 1].mean(), atol=1.5)


def test_class_numbers_are_those_of_the_training_set(open_clips: Callable, clip: Callable) -> None:
    clips = [clip(0, label="walk"), clip(1, label=None), clip(2, label="run"), clip(3, label="jump")]
    assert open_clips(clips).classes == ["jump", "run", "walk"]
    test = open_clips(clips, classes=["walk", "run"])
    assert test.labels().tolist() == [0, -1, 1, -1]
    assert [test[i][0]["label"] for i in range(4)] == [0, -1, 1, -1]


def test_only_wanted_guides_are_read(open_clips: Callable) -> None:
    assert set(open_clips(guides=["motion"])[0][0]["guides"]) == {"noise", "motion"}
    assert set(open_clips(guides=[])[0][0]["guides"]) == {"noise"}


def test_guides_that_some_clips_lack_are_left_out_unless_wanted(open_clips: Callable, clip: Callable) -> None:
    clips = [clip(0), clip(1, captions=[], similarity=None)]
    (sample,) = open_clips(clips)[1]
    assert set(sample["guides"]) == {"noise", "motion", "motion_compensated"} and sample["caption"] == ""
    with pytest.raises(ValueError, match=r"1 of 2 clips have no similarity map, such as 'clip-001'.*masking strategy"):
        open_clips(clips, guides=["similarity"])
    with pytest.raises(ValueError, match="2 of 2 clips have no depth map"):
        open_clips(clips, guides=["depth"])


def test_a_torn_tar_is_named(open_clips: Callable, tmp_path: Path) -> None:
    data = open_clips()
    tar = tmp_path / "train-00000.tar"
    tar.write_bytes(tar.read_bytes()[:20_000])
    with pytest.raises(ValueError, match=r"train-00000\.tar: clip 'clip-002' cannot be read"):
        data[2]


def test_a_disk_that_fails_is_no_damage_of_the_shard(open_clips: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> bytes:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    data = open_clips()
    monkeypatch.setattr("stm.storage.files.os.pread", fail)
    with pytest.raises(OSError, match=r"clip 'clip-002': Stale file handle: '.*train-00000\.tar'") as raised:
        data[2]
    # What is restarted after an error is not restarted after one of the data, which are ValueErrors.
    assert raised.value.errno == errno.ESTALE and not isinstance(raised.value, ValueError)


def test_a_frame_that_is_no_jpeg_is_named(open_clips: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simplejpeg.encode_jpeg", lambda image, **_: bytes(200))  # packed as such, with its checksum
    data = open_clips(train=False)
    with pytest.raises(ValueError, match=r"frame 2 of clip 'clip-000' is not a JPEG"):
        data[0]


def test_a_frame_of_another_size_is_refused(open_clips: Callable, clip: Callable) -> None:
    wrong = np.zeros((12, 64, 72, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match="has 72x64 pixels, and 80x64 in the index"):
        open_clips([clip(0, video=wrong)])[0]


def test_a_map_of_the_right_size_in_bytes_but_another_shape_is_refused(open_clips: Callable, clip: Callable) -> None:
    data = open_clips([clip(0, motion=np.zeros((12, 5, 4, 3), dtype=np.float16))])  # rows and columns swapped
    with pytest.raises(
        ValueError, match=r"motion array of clip 'clip-000' is \(12, 5, 4, 3\).*\(12, 4, 5, 3\) float16"
    ):
        data[0]


def test_many_shards_stay_within_the_limit_of_open_files(tmp_path: Path, shard: Callable, clip: Callable) -> None:
    paths = [shard(tmp_path / f"train-{n:05d}.parquet", [clip(n, frames=2)]) for n in range(12)]
    data = ClipDataset(paths, GEOMETRY, Augmentation(), seed=0, train=True)
    data._reader._max_open = 3
    first = [data[n][0]["video"] for n in range(12)]
    assert len(data._reader._open) == 3
    assert all(np.array_equal(data[n][0]["video"], first[n]) for n in range(12))


def test_the_format_of_maps_is_numpy_s(open_clips: Callable, clip: Callable) -> None:
    """What is read piecewise equals what numpy reads from the whole member."""
    content = clip(0)
    data = open_clips([content])
    entry = data.index[0]
    raw = entry.tar.read_bytes()[entry.arrays["similarity"][0] :][: entry.arrays["similarity"][1]]
    whole = np.load(io.BytesIO(raw))
    np.testing.assert_array_equal(data._reader.layers(entry, "similarity", 3, 5, outer=2), whole[2, 3:6])
    np.testing.assert_array_equal(data._reader.layers(entry, "motion", 4, 6), content["motion"][4:7])


@pytest.mark.parametrize("gigabytes", [1.0, 2e-5])
def test_frames_kept_in_memory_change_nothing_but_how_often_files_are_read(
    open_clips: Callable, gigabytes: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, keeping = open_clips(), open_clips(kept_gigabytes=gigabytes)
    decoded = []
    decode = type(keeping._reader)._decode
    monkeypatch.setattr(type(keeping._reader), "_decode", lambda *a: decoded.append(a[2]) or decode(*a))
    for epoch in range(3):
        for number in range(3):
            assert same(keeping[epoch, number], plain[epoch, number])
    # Every frame at most once where there is room for all of them; more often where there is room for a few.
    kept = sum(pixels.nbytes for pixels in keeping._reader._kept.values())
    assert 0 < kept <= gigabytes * 1e9
    assert (len(keeping._reader._kept) == len(decoded) - 3 * 3 * 4) == (gigabytes == 1.0)


@pytest.mark.parametrize(("stride", "reads"), [(1, 1), (2, 4)])
def test_frames_that_lie_side_by_side_are_one_read(
    open_clips: Callable, clip: Callable, stride: int, reads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    spans = []
    read = reader.read_member
    monkeypatch.setattr(reader, "read_member", lambda *a: spans.append(a[1:]) or read(*a))
    geometry = dataclasses.replace(GEOMETRY, stride=stride)
    data = open_clips([clip(0)], geometry=geometry, guides=())
    window = data.samples.windows(data.index[0], 0)[0].tolist()
    frames = [frame.copy() for _, frame in data._reader.frames(data.index[0], window)]
    assert len(spans) == reads and len(frames) == len(window) == 4
    whole = data.index[0].tar.read_bytes()
    for position, frame in zip(window, frames, strict=True):
        jpeg = whole[data.index[0].offsets[position] :][: data.index[0].sizes[position]]
        assert np.array_equal(frame, simplejpeg.decode_jpeg(jpeg))


def test_damage_inside_of_a_read_names_its_frame(open_clips: Callable, clip: Callable) -> None:
    data = open_clips([clip(0)], guides=())
    entry = data.index[0]
    with entry.tar.open("r+b") as tar:
        tar.seek(int(entry.offsets[2]) + 40)
        tar.write(bytes(8))
    with pytest.raises(ValueError, match="frame 2 of clip 'clip-000' differs from its checksum"):
        data._reader.jpegs(entry, [1, 2, 3])
    assert list(data._reader.jpegs(entry, [3, 1])) == [1, 3]
