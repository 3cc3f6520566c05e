"""Shard indexes: what is read from them, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from stm.shards.index import ClipIndex


def test_clips_of_several_shards_come_in_order_with_their_places(
    tmp_path: Path, shard: Callable, clip: Callable
) -> None:
    first = shard(tmp_path / "train-00000.parquet", [clip(0, frames=3), clip(1, frames=5)])
    empty = shard(tmp_path / "train-00001.parquet", [])
    second = shard(tmp_path / "train-00002.parquet", [clip(2, frames=2, captions=[], label=None, similarity=None)])
    index = ClipIndex([first, empty, second])
    assert [index[i].key for i in range(len(index))] == ["clip-000", "clip-001", "clip-002"]
    assert index.labels() == ["a", "b", None]
    last = index[2]
    assert (last.tar, last.frames, last.captions, set(last.arrays)) == (second.with_suffix(".tar"), 2, [], {"motion"})
    assert index.lacking("similarity").tolist() == [2] and index.lacking("motion").tolist() == []
    rows = pq.read_table(first).to_pylist()
    assert index[1].offsets.tolist() == rows[1]["offsets"] and index[1].sizes.tolist() == rows[1]["sizes"]
    assert index[1].arrays["motion"] == (rows[1]["motion_offset"], rows[1]["motion_size"])


def test_a_map_made_from_other_frames_is_refused(tmp_path: Path, shard: Callable, clip: Callable) -> None:
    wrong = np.zeros((11, 4, 5, 3), dtype=np.float16)  # the clip has 12 frames
    path = shard(tmp_path / "a.parquet", [clip(0), clip(1, motion=wrong)])
    with pytest.raises(
        ValueError, match=r"a\.parquet: clip 'clip-001' \(1 in all\): the shape of its motion array does not match"
    ):
        ClipIndex([path])


def test_a_similarity_map_without_its_captions_is_refused(tmp_path: Path, shard: Callable, clip: Callable) -> None:
    path = shard(tmp_path / "a.parquet", [clip(0, captions=["one"], similarity=np.zeros((2, 12, 4, 5), np.float16))])
    with pytest.raises(ValueError, match="the shape of its similarity array does not match"):
        ClipIndex([path])


def test_a_missing_tar_is_refused_by_name(tmp_path: Path, shard: Callable, clip: Callable) -> None:
    path = shard(tmp_path / "a.parquet", [clip(0)])
    path.with_suffix(".tar").unlink()
    with pytest.raises(ValueError, match=r"a\.tar is missing.*stage `shards`"):
        ClipIndex([path])


def test_the_same_shard_twice_is_refused(tmp_path: Path, shard: Callable, clip: Callable) -> None:
    path = shard(tmp_path / "a.parquet", [clip(0)])
    with pytest.raises(ValueError, match="'clip-000' is in the given shards 2 times"):
        ClipIndex([path, path])


def test_no_clips_at_all_is_refused(tmp_path: Path, shard: Callable) -> None:
    path = shard(tmp_path / "a.parquet", [])
    with pytest.raises(ValueError, match=r"no clips in .*a\.parquet"):
        ClipIndex([path])
    with pytest.raises(ValueError, match="no shards at all"):
        ClipIndex([])


def test_a_torn_index_is_refused(tmp_path: Path, shard: Callable, clip: Callable) -> None:
    path = shard(tmp_path / "a.parquet", [clip(0)])
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"a\.parquet: cannot be read"):
        ClipIndex([path])


def test_arrays_of_another_shape_and_uncounted_sources_are_refused(
    tmp_path: Path, shard: Callable, clip: Callable
) -> None:
    flow = np.zeros((2, 12, 8, 10, 2), np.float16)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"flow": flow[:, :-1]}, "the shape of its flow array does not match"),
        ({"text": np.zeros((2, 6), np.float16)}, "the shape of its text array does not match"),
        ({"caption_sources": ["human"]}, "it has 1 caption sources for 3 captions"),
    ]
    for change, message in cases:
        with pytest.raises(ValueError, match=message):
            ClipIndex([shard(tmp_path / "a.parquet", [clip(0, **change)])])


def test_old_and_new_shards_are_read_together(tmp_path: Path, shard: Callable, clip: Callable) -> None:
    first = shard(tmp_path / "a.parquet", [clip(0)], old=True)
    content = {"flow": np.zeros((2, 12, 8, 10, 2), np.float16), "text": np.zeros((3, 6), np.float16)}
    second = shard(tmp_path / "b.parquet", [clip(1, **content, caption_sources=["a", "b", "a"])])
    index = ClipIndex([first, second])
    assert index.lacking("flow").tolist() == index.lacking("text").tolist() == [0]
    assert (index.values("flow_cells"), index.values("text_width"), index.sources()) == ([2], [6], ["a", "b"])
    assert index.count_captions().tolist() == [3, 3] and index.count_captions(["a"]).tolist() == [0, 2]
    assert (index[0].sources, index[1].sources) == ([], ["a", "b", "a"])
    assert index[1].array_shape("flow") == (2, 12, 8, 10, 2) and index[1].array_shape("text") == (3, 6)


def test_a_damaged_column_name_is_not_taken_for_an_older_index(tmp_path: Path, shard: Callable, clip: Callable) -> None:
    """Parquet has checksums of its pages, and none of its footer, which holds the names."""
    path = shard(tmp_path / "a.parquet", [clip(0)])
    sound = path.read_bytes()
    for name in (b"caption_sources", b"crc32", b"motion_crc32"):
        damaged = sound.replace(name, name[:-1] + bytes([name[-1] ^ 1]))
        assert damaged != sound
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"a\.parquet: has .*column.*{name[:-2].decode()}"):
            ClipIndex([path])
