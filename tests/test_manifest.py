"""Clips are assigned to shards such that adding one clip changes one shard."""

import hashlib
import re
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stm.jobs.status import Policy, Status
from stm.manifest import (
    MANIFEST_SCHEMA,
    SHARD_PATTERN,
    ChangedVideoError,
    TooManyFailures,
    assign_shard,
    check_failures,
    check_unchanged,
    hash_ends,
    make_key,
    name_shard,
    order_shards,
    read_rows,
    read_shards,
    read_slice,
    split_of,
    write_slices,
)
from stm.storage.tables import DamagedError, read_table, write_table


def test_growing_by_one_shard_moves_clips_of_one_shard_only():
    ids = [f"clip-{i}" for i in range(4000)]
    for shards in range(1, 40):
        moves = {(assign_shard(i, shards), assign_shard(i, shards + 1)) for i in ids}
        changes = {pair for pair in moves if pair[0] != pair[1]}
        assert {new for _, new in changes} <= {shards}
        assert len({old for old, _ in changes}) <= 1


@given(st.text(min_size=1), st.integers(1, 5000))
def test_every_clip_has_a_shard(video_id, shards):
    assert 0 <= assign_shard(video_id, shards) < shards


def test_a_power_of_two_of_shards_is_balanced():
    counts = Counter(assign_shard(f"v{i}", 64) for i in range(64_000))
    assert len(counts) == 64
    assert max(counts.values()) < 1200


@given(st.lists(st.text(min_size=1), unique=True, max_size=50))
def test_keys_are_unique_plain_and_short(ids):
    keys = [make_key(video_id) for video_id in ids]
    assert len(set(keys)) == len(ids)
    for key in keys:
        assert "." not in key
        assert "/" not in key
        assert 0 < len(key) <= 64
        assert key.isascii()


def write_manifest(path, ids):
    rows = [{"video_id": i, "key": make_key(i), "path": f"{i}.mp4", "split": "train"} for i in sorted(ids)]
    write_table(path, pa.Table.from_pylist(rows, schema=MANIFEST_SCHEMA), {})


def test_adding_a_clip_rewrites_one_slice(tmp_path):
    manifest, folder, index = tmp_path / "m.parquet", tmp_path / "slices", tmp_path / "slices.json"
    ids = [f"v{i}" for i in range(31)]  # 31 -> 32 clips: no new shard of 8
    write_manifest(manifest, ids)
    shards = write_slices(manifest, folder, index, 8)
    before = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.iterdir()}
    write_manifest(manifest, [*ids, "new"])
    assert write_slices(manifest, folder, index, 8) == shards
    after = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.iterdir()}
    assert sum(before[name] != after[name] for name in after) == 1
    rows = [row["video_id"] for shard in shards for row in read_rows(folder / f"{shard}.parquet")]
    assert sorted(rows) == sorted([*ids, "new"])


def test_slices_that_a_smaller_manifest_no_longer_has_are_removed(tmp_path):
    manifest, folder, index = tmp_path / "m.parquet", tmp_path / "slices", tmp_path / "slices.json"
    write_manifest(manifest, [f"v{i}" for i in range(40)])
    write_slices(manifest, folder, index, 4)
    write_manifest(manifest, ["v1"])
    assert [p.stem for p in folder.iterdir()] != write_slices(manifest, folder, index, 4)
    assert [p.stem for p in folder.iterdir()] == ["train-00000"]


def test_too_many_failed_clips_in_a_shard_stop_the_stage_with_their_names():
    rows: list[tuple[str, Status, Policy, str]] = [(f"v{i}", Status.TIMEOUT, "drop", "30 s") for i in range(6)]
    rows += [("w", Status.OK, "keep", "")] * 4
    check_failures("frames", rows, 0.6)
    with pytest.raises(TooManyFailures, match=r"dropped 6 of 10.*\n.*v0: timeout: 30 s"):
        check_failures("frames", rows, 0.5)
    check_failures("frames", rows[:6], 0.5)  # small shards never stop
    with pytest.raises(TooManyFailures, match="policy is `fail`"):
        check_failures("frames", [("v", Status.TRUNCATED, "fail", "x")], 1.0)


def test_shards_of_six_digits_follow_those_of_five(tmp_path, monkeypatch):
    numbers = {"a": 2, "b": 99_999, "c": 100_000, "d": 100_001, "e": 999_999, "f": 1_000_000}
    monkeypatch.setattr("stm.manifest.assign_shard", lambda video_id, shards: numbers[video_id])
    manifest, folder, index = tmp_path / "m.parquet", tmp_path / "slices", tmp_path / "slices.json"
    write_manifest(manifest, numbers)
    written = write_slices(manifest, folder, index, 1)
    assert written == ["train-00002", "train-99999", "train-100000", "train-100001", "train-999999", "train-1000000"]
    assert read_shards(index) == written
    assert [read_rows(folder / f"{shard}.parquet")[0]["video_id"] for shard in written] == list("abcdef")
    assert {split_of(shard) for shard in written} == {"train"}
    assert all(re.fullmatch(SHARD_PATTERN, shard) for shard in written)


def test_the_order_of_small_sets_is_that_of_the_alphabet():
    shards = [name_shard(split, index) for split in ("val", "test", "train-2", "train") for index in (0, 7, 12, 19_999)]
    assert order_shards(shards) == sorted(shards)


def video_row(path, **more):
    return {"video_id": "v", "path": path.name, "bytes": path.stat().st_size, "ends_hash": hash_ends(path)} | more


@pytest.mark.parametrize("size", [1, 1000, 64 * 1024, 200_000])
def test_a_file_with_other_ends_or_another_size_is_not_the_video_of_the_manifest(size, tmp_path):
    path, data = tmp_path / "a.mp4", bytes(range(1, 251)) * (size // 250 + 1)
    path.write_bytes(data[:size])
    row = video_row(path)
    check_unchanged(path, row)
    changes = [data[: size - 1] + b"\0", b"\0" + data[1:size], data[:size] + b"\0", data[: size - 1]]
    for change in changes:
        path.write_bytes(change)
        with pytest.raises(ChangedVideoError, match=rf"a\.mp4 \(clip 'v'\).*{size:,} bytes.*Make the manifest again"):
            check_unchanged(path, row)
        check_unchanged(path, row | {"ends_hash": None})  # from a manifest of an older version
    path.unlink()
    check_unchanged(path, row)  # opening it gives the clip its status


def test_the_hash_of_a_files_ends_is_the_documented_one(tmp_path):
    data = bytes(range(256)) * 1000
    (tmp_path / "a").write_bytes(data)
    expected = hashlib.sha256(b"256000\0" + data[:65536] + data[-65536:]).hexdigest()[:16]
    assert hash_ends(tmp_path / "a") == expected


def test_a_manifest_of_an_older_version_is_split_as_before(tmp_path):
    manifest, folder = tmp_path / "m.parquet", tmp_path / "slices"
    write_manifest(manifest, ["a", "b"])
    old = read_table(manifest).drop_columns(["ends_hash"])
    write_table(manifest, old, {})
    (shard,) = write_slices(manifest, folder, tmp_path / "slices.json", 8)
    assert read_table(folder / f"{shard}.parquet").schema.names == old.schema.names
    assert [row["video_id"] for row in read_rows(folder / f"{shard}.parquet")] == ["a", "b"]
    write_table(manifest, old.drop_columns(["sha256"]), {})
    with pytest.raises(DamagedError, match="0 columns `sha256`"):
        write_slices(manifest, folder, tmp_path / "slices.json", 8)


def test_what_the_message_of_a_damaged_slice_says_to_remove_mends_it(tmp_path: Path) -> None:
    manifest = tmp_path / "manifest.parquet"
    write_manifest(manifest, [f"clip-{number:02d}" for number in range(40)])
    folder, index = tmp_path / "slices", tmp_path / "slices.json"
    shards = write_slices(manifest, folder, index, 10)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    damaged, other, *_ = (folder / f"{shard}.parquet" for shard in shards)
    for data in (None, b"", before[damaged][:-100], before[damaged][:300] + b"\0" + before[damaged][301:]):
        damaged.unlink()
        if data is not None:
            damaged.write_bytes(data)
        with pytest.raises(DamagedError, match=f"{damaged}: .*; remove {index}, .* and run again"):
            read_slice(damaged)
        index.unlink()  # Snakemake then runs the split stage again
        write_slices(manifest, folder, index, 10)
        assert {path: path.read_bytes() for path in folder.iterdir()} == before
        assert other.stat().st_mtime_ns == times[other], "the stages of other shards would run again"
