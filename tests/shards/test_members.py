"""Captions' vectors, flow, views and augmentation, from the shard to the sample."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stm.config import Augmentation, CaptionChoice, FineTune, PretrainRun
from stm.data.dataset import ClipDataset
from stm.data.geometry import Geometry
from stm.data.loader import collate

GEOMETRY = Geometry(image_size=32, patch_size=8, tubelet=2, frames=4, stride=2)
SOURCES = ["human", "human", "blip2"]


def make_text(number: int, captions: int = 3, width: int = 6) -> np.ndarray:
    vectors = np.random.default_rng(number).normal(size=(captions, width))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)


def make_flow(number: int, frames: int = 12, rows: int = 4, columns: int = 5, cells: int = 2) -> np.ndarray:
    shape = (2, frames, rows * cells, columns * cells, 2)
    return np.random.default_rng(number).normal(size=shape).astype(np.float16)


@pytest.fixture
def open_clips(tmp_path: Path, shard: Callable, clip: Callable) -> Callable[..., ClipDataset]:
    def build(clips: list[dict] | None = None, *, old: bool = False, **changes: Any) -> ClipDataset:
        made = [clip(n, text=make_text(n), flow=make_flow(n), caption_sources=SOURCES) for n in range(3)]
        path = shard(tmp_path / "train-00000.parquet", clips or made, old=old)
        arguments: dict[str, Any] = {
            "geometry": GEOMETRY,
            "augmentation": Augmentation(),
            "seed": 3,
            "train": True,
        } | changes
        return ClipDataset([path], **arguments)

    return build


def test_text_is_the_unit_vector_of_the_drawn_caption(open_clips: Callable) -> None:
    data = open_clips(text=True)
    seen = set()
    for epoch in range(30):
        (sample,) = data[epoch, 1]
        assert sample["text"].dtype == np.float32 and abs(np.linalg.norm(sample["text"]) - 1) < 1e-6
        np.testing.assert_allclose(sample["text"], make_text(1)[sample["caption_index"]], atol=1e-3)
        assert sample["caption"] == ["one", "two", "three"][sample["caption_index"]]
        seen.add(sample["caption_index"])
    assert seen == {0, 1, 2}


def test_captions_come_from_the_chosen_sources_only(open_clips: Callable) -> None:
    data = open_clips(text=True, captions=CaptionChoice(sources=("human",), count=1))
    assert {data[epoch, 0][0]["caption_index"] for epoch in range(10)} == {1}
    assert data.caption_numbers(0) == [1]
    np.testing.assert_allclose(data.texts(0), make_text(0)[[1]], atol=1e-3)
    similarity = data._reader.layers(data.index[0], "similarity", 0, 11, outer=1).astype(np.float32)
    (sample,) = data[4, 0]
    assert similarity.min() <= sample["guides"]["similarity"].min()
    whole = open_clips(train=False, captions=CaptionChoice(sources=("blip2",)))
    assert whole[0][0]["caption"] == "three"


def test_similarity_is_the_chosen_caption_s(open_clips: Callable, clip: Callable) -> None:
    levels = np.arange(3, dtype=np.float16)[:, None, None, None] * np.ones((3, 12, 4, 5), dtype=np.float16)
    data = open_clips([clip(0, similarity=levels, caption_sources=SOURCES)], captions=CaptionChoice(sources=("blip2",)))
    np.testing.assert_allclose(data[0][0]["guides"]["similarity"], 2, atol=1e-5)


def test_a_clip_without_captions_has_no_text(open_clips: Callable, clip: Callable) -> None:
    mute = clip(0, captions=[], caption_sources=[], similarity=None)
    data = open_clips([mute, clip(1, text=make_text(1), caption_sources=SOURCES)], text=True)
    (sample,) = data[0]
    assert (sample["caption"], sample["caption_index"]) == ("", -1) and sample["text"].tolist() == [0.0] * 6
    assert data.caption_numbers(0) == [] and data.texts(0).shape == (0, 6)
    batch = collate([data[0], data[1]])
    assert batch["text"].shape == (2, 6) and batch["caption_index"][0] == -1


def test_what_cannot_be_drawn_is_refused_at_once(open_clips: Callable, clip: Callable) -> None:
    with pytest.raises(ValueError, match=r"no clip has captions of gpt; packed sources: blip2, human"):
        open_clips(captions=CaptionChoice(sources=("gpt", "human")))
    with pytest.raises(ValueError, match=r"1 of 1 clips have captions without vectors, such as 'clip-000'.*pack\.text"):
        open_clips([clip(0)], text=True)
    with pytest.raises(ValueError, match="the shards have no captions, but caption vectors are required"):
        open_clips([clip(0, captions=[], similarity=None)], text=True)
    two = [clip(0, text=make_text(0)), clip(1, text=make_text(1, width=7))]
    with pytest.raises(ValueError, match=r"vectors of widths \[6, 7\]: pack all shards with one text encoder"):
        open_clips(two, text=True)
    some = [clip(0), clip(1, caption_sources=SOURCES)]
    with pytest.raises(ValueError, match=r"1 of 2 clips have no similarity map of a caption from blip2"):
        open_clips(some, guides=["similarity"], captions=CaptionChoice(sources=("blip2",)))
    mixed = [clip(0, flow=make_flow(0)), clip(1, flow=make_flow(1, cells=1))]
    with pytest.raises(ValueError, match=r"flow maps have \[1, 2\] cells"):
        open_clips(mixed, guides=["flow"])


def test_guides_that_a_method_makes_itself_are_passed_over(open_clips: Callable) -> None:
    assert set(open_clips(guides=["attention"])[0][0]["guides"]) == {"noise"}


def test_flow_leads_from_each_taken_frame_to_the_next(open_clips: Callable, clip: Callable) -> None:
    """A pattern that moves evenly: in every crop, what flow points to looks like what it starts from."""
    width, height, frames = 160, 128, 12
    speed = np.array([2.0, -1.0])  # pixels a stored frame
    y, x = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    waves = [
        np.sin((x - speed[0] * t) / 9) + np.sin((y - speed[1] * t) / 7 + (x - speed[0] * t) / 23) for t in range(frames)
    ]
    video = np.repeat((128 + 50 * np.stack(waves))[..., None], 3, axis=-1).round().astype(np.uint8)
    flow = np.zeros((2, frames, 16, 20, 2), dtype=np.float16)
    flow[0, :-1], flow[1, 1:] = speed / 16, -speed / 16  # in map cells of 16 pixels
    content = {"video": video, "width": width, "height": height, "rows": 8, "columns": 10, "flow": flow}
    geometry = Geometry(image_size=64, patch_size=16, tubelet=2, frames=4, stride=2)
    data = open_clips([clip(0, similarity=None, motion=None, **content)], geometry=geometry, guides=["flow"])
    signs = set()
    for epoch in range(12):
        (sample,) = data[epoch, 0]
        flow_now, pixels = sample["guides"]["flow"], sample["video"][:, 0].astype(float)
        assert flow_now.shape == (2, 4, 8, 8, 2) and flow_now.dtype == np.float32
        for first, second, vectors in [(0, 1, flow_now[0, 0]), (2, 1, flow_now[1, 2])]:
            dx, dy = (vectors[4, 4] * 16).round(3)  # in pixels of the crop
            np.testing.assert_allclose(vectors, np.broadcast_to(vectors[4, 4], vectors.shape), atol=1e-3)
            rows, columns = np.arange(16, 48), np.arange(16, 48)
            there = sample_at(pixels[second], rows + dy, columns + dx)
            here = pixels[first][16:48, 16:48]
            assert np.abs(there - here).mean() < 2.5 < np.abs(pixels[second][16:48, 16:48] - here).mean() / 2
        signs.add(np.sign(flow_now[0, 0, 4, 4, 0]))
        assert not flow_now[0, -1].any() and not flow_now[1, 0].any()
    assert signs == {-1.0, 1.0}  # flipped and not


def sample_at(picture: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Bilinear values at rows x columns."""
    top, left = np.floor(rows).astype(int), np.floor(columns).astype(int)
    down, across = (rows - top)[:, None], (columns - left)[None]
    above = picture[np.ix_(top, left)] * (1 - across) + picture[np.ix_(top, left + 1)] * across
    under = picture[np.ix_(top + 1, left)] * (1 - across) + picture[np.ix_(top + 1, left + 1)] * across
    return above * (1 - down) + under * down


def test_views_and_crops_are_numbered_view_by_view(open_clips: Callable) -> None:
    """Red tells the frame, green the place from left to right (see make_frames)."""
    data = open_clips(train=False, views=2, crops=3)
    samples = data[0]
    assert data.samples_per_clip == 6 and [sample["view"] for sample in samples] == list(range(6))
    red = [(sample["video"][0, 0].mean() - 10) / 5 for sample in samples]
    np.testing.assert_allclose(red, [0, 0, 0, 4, 4, 4], atol=0.3)
    green = np.array([sample["video"][0, 1].mean() for sample in samples]).reshape(2, 3)
    # Squares of 64 pixels from 0, 8 and 16 of 80 columns.
    expected = 40 + 150 * (np.array([0, 8, 16]) + 31.5) / 79
    np.testing.assert_allclose(green, np.stack([expected, expected]), atol=1.5)
    (centre,) = open_clips(train=False)[0]
    middle = open_clips(train=False, crops=3)[0][1]
    np.testing.assert_array_equal(middle["video"], centre["video"])


def test_segments_are_taken_where_asked(open_clips: Callable) -> None:
    geometry = Geometry(32, 8, 2, 4, 2, "tsn")
    test = open_clips(train=False, views=2, geometry=geometry)[0]
    red = [np.rint((sample["video"][:, 0].mean(axis=(1, 2)) - 10) / 5).tolist() for sample in test]
    assert red == [[0, 3, 6, 9], [1, 4, 7, 10]]
    train = open_clips(geometry=geometry)
    for epoch in range(10):
        taken = np.rint((train[epoch, 0][0]["video"][:, 0].mean(axis=(1, 2)) - 10) / 5)
        assert (taken // 3).tolist() == [0, 1, 2, 3]


def test_a_task_s_sampling_and_stride_go_before_the_run_s() -> None:
    run = PretrainRun(stride=4, sampling="dense")
    assert (Geometry.of(run).stride, Geometry.of(run).sampling) == (4, "dense")
    assert Geometry.of(run, FineTune(task="finetune")) == Geometry.of(run)
    own = Geometry.of(run, FineTune(task="finetune", sampling="tsn", stride=2))
    assert (own.stride, own.sampling, own.frames) == (2, "tsn", run.frames)


def test_augmentation_changes_pixels_only_and_all_frames_alike(open_clips: Callable, clip: Callable) -> None:
    still = np.repeat(np.random.default_rng(0).integers(0, 256, (1, 64, 80, 3), dtype=np.uint8), 12, axis=0)
    clips = [clip(0, video=still)]
    plain = open_clips(clips, repeats=2)
    changed = open_clips(clips, repeats=2, augmentation=Augmentation(auto_augment="rand-m7-n4-mstd0.5-inc1"))
    different = 0
    for epoch in range(8):
        for before, after in zip(plain[epoch, 0], changed[epoch, 0], strict=True):
            assert (after["video"] == after["video"][:1]).all()
            assert all(np.array_equal(before["guides"][name], after["guides"][name]) for name in before["guides"])
            assert before["caption"] == after["caption"]
            different += not np.array_equal(before["video"], after["video"])
        first, second = changed[epoch, 0]
        assert not np.array_equal(first["video"], second["video"])
    assert different > 8


def test_erasing_comes_last_and_only_in_training(open_clips: Callable) -> None:
    policy = "rand-m7-n4-mstd0.5-inc1"
    plain = open_clips(augmentation=Augmentation(auto_augment=policy))
    erased = open_clips(augmentation=Augmentation(auto_augment=policy, erasing=1.0))
    for epoch in range(5):
        changed = plain[epoch, 0][0]["video"] != erased[epoch, 0][0]["video"]
        place = changed.any(axis=(0, 1))
        rows, columns = np.flatnonzero(place.any(axis=1)), np.flatnonzero(place.any(axis=0))
        box = changed[:, :, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert box.mean() > 0.9 and changed.sum() == box.sum()  # one box, in all frames and colours
    settings = {"train": False, "augmentation": Augmentation(auto_augment=policy, erasing=1.0)}
    np.testing.assert_array_equal(open_clips(**settings)[0][0]["video"], open_clips(train=False)[0][0]["video"])


def test_shards_of_an_older_version_are_read(open_clips: Callable, clip: Callable) -> None:
    old = open_clips([clip(0), clip(1)], old=True)
    (sample,) = old[2, 0]
    assert set(sample["guides"]) == {"noise", "similarity", "motion", "motion_compensated"}
    assert old.index[0].sources == [] and sample["caption_index"] in (0, 1, 2)
    np.testing.assert_array_equal(sample["video"], open_clips([clip(0), clip(1)])[2, 0][0]["video"])
    assert open_clips([clip(0)], old=True, captions=CaptionChoice(count=1)).caption_numbers(0) == [1]
    with pytest.raises(ValueError, match="no clip has captions of human; packed sources: none that name their source"):
        open_clips([clip(0)], old=True, captions=CaptionChoice(sources=("human",)))
    with pytest.raises(ValueError, match="captions without vectors"):
        open_clips([clip(0)], old=True, text=True)
