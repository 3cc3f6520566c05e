"""The shards stage: plain WebDataset reads the tar, and the index locates every member of it."""

import hashlib
import io
import json
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import simplejpeg
import webdataset
from packing_inputs import CLIPS, EVERYTHING, index_of, make_inputs, member_of, path_of, run
from stage_outputs import MOTION_SCHEMA, Clip

from stm.config import BadInput, Pack
from stm.manifest import TooManyFailures
from stm.preprocess.flow.estimate import FLOW_SCHEMA
from stm.preprocess.frames.table import FRAMES_SCHEMA
from stm.preprocess.packing.pack import verify_shard
from stm.preprocess.similarity.score import SIMILARITY_SCHEMA
from stm.shards.schema import ARRAYS, list_members
from stm.storage.files import sha256_file
from stm.storage.tables import read_receipt, read_table, stream_rows, write_rows, write_table

# -------------------------------------------------------------------------------------------------- format and content


def test_plain_webdataset_reads_what_the_index_reads(tmp_path: Path) -> None:
    tar = run(make_inputs(tmp_path), EVERYTHING)
    samples = list(webdataset.WebDataset(str(tar), shardshuffle=False, empty_check=False).decode("rgb8"))
    rows = index_of(tar)
    assert [sample["__key__"] for sample in samples] == [row["key"] for row in rows]
    assert [row["video_id"] for row in rows] == ["a video/with.dots", "b", "silent"]
    for sample, row in zip(samples, rows, strict=True):
        assert sample["json"]["video_id"] == row["video_id"]
        arrays = {f"{part}.npy" for part in ARRAYS}
        names = {"json", *arrays, *(f"{n:04d}.jpg" for n in range(row["frames"]))}
        assert {name for name in sample if not name.startswith("__")} == names
        for number, (offset, size) in enumerate(zip(row["offsets"], row["sizes"], strict=True)):
            ours = simplejpeg.decode_jpeg(member_of(tar, offset, size), colorspace="RGB")
            # webdataset decodes with PIL, which rounds colours a little differently.
            difference = np.abs(sample[f"{number:04d}.jpg"].astype(int) - ours)
            assert difference.shape == (row["height"], row["width"], 3) and difference.max() <= 3
        for part in ARRAYS:
            data = member_of(tar, row[f"{part}_offset"], row[f"{part}_size"])
            np.testing.assert_array_equal(sample[f"{part}.npy"], np.load(io.BytesIO(data)))


def test_maps_and_description_are_those_of_the_stages(tmp_path: Path) -> None:
    made = make_inputs(tmp_path)
    tar = run(made)
    similarity = {r["key"]: r for r in read_table(tmp_path / "similarity.parquet").to_pylist()}
    motion = {r["key"]: r for r in read_table(made.motion).to_pylist()}
    for row in index_of(tar):
        shape = (row["frames"], row["rows"], row["columns"])
        found = np.load(io.BytesIO(member_of(tar, row["similarity_offset"], row["similarity_size"])))
        expected = np.array(similarity[row["key"]]["similarity"], np.float16)
        assert found.dtype == np.float16 and found.shape == (len(row["captions"]), *shape)
        np.testing.assert_array_equal(found.ravel(), expected)
        found = np.load(io.BytesIO(member_of(tar, row["motion_offset"], row["motion_size"])))
        assert found.dtype == np.float16 and found.shape == (*shape, 3)
        np.testing.assert_array_equal(found[..., 0].ravel(), np.array(motion[row["key"]]["magnitude"], np.float16))
        np.testing.assert_array_equal(found[..., 1:].ravel(), np.array(motion[row["key"]]["vector"], np.float16))
        described = json.loads(member_of(tar, row["json_offset"], row["json_size"]))
        assert described.pop("questions") == [{"question": "what?", "answer": "that"}]
        assert described["caption_sources"] == ["human"] * len(row["captions"])
        assert described == {name: row[name] for name in described} and len(described) == 11


def test_frames_are_copied_not_recompressed(tmp_path: Path) -> None:
    made = make_inputs(tmp_path)
    tar = run(made)
    stored = {r["key"]: r for r in read_table(made.index).to_pylist()}
    for row in index_of(tar):
        hashes = [
            hashlib.sha256(member_of(tar, *place)).hexdigest()
            for place in zip(row["offsets"], row["sizes"], strict=True)
        ]
        assert hashes == stored[row["key"]]["sha256"]


def test_index_agrees_with_tarfile(tmp_path: Path) -> None:
    tar = run(make_inputs(tmp_path), EVERYTHING)
    with tarfile.open(tar) as archive:
        members = [(m.name, m.offset_data, m.size) for m in archive]
        hashes = [hashlib.sha256(archive.extractfile(name).read()).hexdigest() for name, *_ in members]
        plain = {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in archive.getmembers()}
    rows = index_of(tar)
    assert [place for row in rows for place in list_members(row)] == members
    assert [digest for row in rows for digest in row["sha256"]] == hashes
    assert plain == {(0, 0, 0, "", "", 0o644)}
    receipt = read_receipt(tar.with_suffix(".parquet"))
    assert (receipt["tar_sha256"], receipt["clips"]) == (sha256_file(tar), 3)


def test_the_same_inputs_give_the_same_bytes(tmp_path: Path) -> None:
    first, second = (run(make_inputs(tmp_path / name), EVERYTHING) for name in "xy")
    assert first.read_bytes() == second.read_bytes()
    assert first.with_suffix(".parquet").read_bytes() == second.with_suffix(".parquet").read_bytes()


# --------------------------------------------------------------------------------------------------------- what is packed


def test_parts_that_are_not_packed_are_not_read(tmp_path: Path) -> None:
    made = make_inputs(tmp_path)
    tar = run(made, Pack(captions=None, motion=False), captions={}, similarity={}, motion=None, flow=None, text={})
    rows = index_of(tar)
    assert [row["key"] for row in rows] == sorted(c.key for c in CLIPS if c.kept)
    assert all(row["captions"] == [] and row["similarity_offset"] is row["motion_offset"] is None for row in rows)
    assert all(len(row["sha256"]) == 1 + row["frames"] for row in rows)
    tar = run(
        made, Pack(captions="human", similarity=False, motion=False), similarity={}, motion=None, flow=None, text={}
    )
    assert [row["captions"] for row in index_of(tar)] == [["three"], ["one", "two"]]


@pytest.mark.parametrize("part", ["captions", "similarity", "text", "motion", "flow"])
def test_a_part_that_is_packed_must_be_given(tmp_path: Path, part: str) -> None:
    made = make_inputs(tmp_path)
    # Given for one source only.
    missing: Any = None if part in ("motion", "flow") else {"human": path_of(tmp_path, part)}
    with pytest.raises(ValueError, match=rf"pack\.{part} is set"):
        run(made, EVERYTHING, **{part: missing})
    assert not list(tmp_path.glob("*packed*"))


def test_a_clip_without_captions_stays_when_the_policy_says_so(tmp_path: Path) -> None:
    tar = run(
        make_inputs(tmp_path),
        bad_input=BadInput.model_validate({"policy": {"caption_missing": "keep"}, "max_failure_rate": 1}),
    )
    silent = next(row for row in index_of(tar) if row["key"] == "silent")
    assert silent["captions"] == [] and silent["similarity_offset"] is None and silent["motion_offset"] is not None


@pytest.mark.parametrize("policy", ["keep", "drop"])
@pytest.mark.parametrize(("part", "schema"), [("motion", MOTION_SCHEMA), ("flow", FLOW_SCHEMA)])
def test_motion_and_flow_decide_too(tmp_path: Path, part: str, schema: pa.Schema, policy: str) -> None:
    made = make_inputs(tmp_path)
    rows = read_table(path_of(tmp_path, part)).to_pylist()
    nothing = {name: None for name in ("magnitude", "vector", "intra", "forward", "backward") if name in schema.names}
    for row in rows:
        if row["key"] == "b":
            row |= nothing | {"status": "timeout", "policy": policy}
    write_table(path_of(tmp_path, part), pa.Table.from_pylist(rows, schema), {})
    packed = {row["key"]: row for row in index_of(run(made, Pack(captions="human", flow=True)))}
    assert ("b" in packed) == (policy == "keep")
    assert policy == "drop" or packed["b"][f"{part}_offset"] is packed["b"][f"{part}_size"] is None
    assert policy == "drop" or (packed["b"]["flow_cells"] is None) == (part == "flow")


def test_too_many_dropped_clips_stop_the_stage(tmp_path: Path) -> None:
    made = make_inputs(tmp_path, [Clip(f"c{i}", frames=1, captions=None) for i in range(8)])
    with pytest.raises(TooManyFailures, match="caption_missing"):
        run(made, bad_input=BadInput(max_failure_rate=0.5))


def test_a_shard_without_clips_is_empty_and_readable(tmp_path: Path) -> None:
    tar = run(make_inputs(tmp_path, [Clip("lost", kept=False)]))
    assert index_of(tar) == [] and verify_shard(tar, tar.with_suffix(".parquet")) == 0
    assert list(webdataset.WebDataset(str(tar), shardshuffle=False, empty_check=False)) == []


# ---------------------------------------------------------------------------------------------------------- wrong inputs


def test_maps_of_other_captions_or_another_grid_are_refused(tmp_path: Path) -> None:
    made = make_inputs(tmp_path)
    similarity = tmp_path / "similarity.parquet"
    rows = list(stream_rows(similarity, ("similarity",)))
    changed = [{**rows[0], "captions": ["other"]}, *rows[1:]]
    write_rows(similarity, SIMILARITY_SCHEMA, changed, {}, group=2)
    with pytest.raises(ValueError, match="scored against different captions"):
        run(made)
    changed = [{**rows[0], "similarity": rows[0]["similarity"][:-1]}, *rows[1:]]
    write_rows(similarity, SIMILARITY_SCHEMA, changed, {}, group=2)
    with pytest.raises(ValueError, match="a different grid or from different frames"):
        run(made)
    write_rows(similarity, SIMILARITY_SCHEMA, rows[1:], {}, group=2)
    with pytest.raises(ValueError, match="has no row for the kept clip"):
        run(made)


def test_rows_of_clips_that_were_not_kept_are_passed_over(tmp_path: Path) -> None:
    made = make_inputs(tmp_path)
    rows = read_table(made.motion).to_pylist()
    lost = dict.fromkeys(MOTION_SCHEMA.names) | {
        "key": "lost",
        "video_id": "lost",
        "frames": 1,
        "rows": 4,
        "columns": 5,
    }
    lost |= {"status": "too_short", "policy": "drop", "detail": "1 frame"}
    rows = sorted([*rows, lost], key=lambda row: row["key"])
    write_table(made.motion, pa.Table.from_pylist(rows, MOTION_SCHEMA), {})
    assert [row["key"] for row in index_of(run(made))] == [c.key for c in (CLIPS[1], CLIPS[0])]


def test_damaged_frames_are_noticed_and_leave_nothing_behind(tmp_path: Path) -> None:
    made = make_inputs(tmp_path)
    row = next(r for r in read_table(made.index).to_pylist() if r["key"] == "b")
    data = bytearray(made.tar.read_bytes())
    data[row["offsets"][1] + 40] ^= 1
    made.tar.write_bytes(data)
    with pytest.raises(ValueError, match="stored frame 1 of clip 'b': is not what its index says"):
        run(made)
    assert not list(tmp_path.glob("*packed*"))


@pytest.mark.parametrize("key", ["../../escape", "/root", "a.b", "", "a\nb", "x" * 65])
def test_hostile_keys_never_become_names(tmp_path: Path, key: str) -> None:
    made = make_inputs(tmp_path, [Clip("b", frames=1)])
    for path, schema in ((made.index, FRAMES_SCHEMA), (made.slice, None)):
        table = read_table(path)
        rows = [row | {"key": key} for row in table.to_pylist()]
        write_table(path, pa.Table.from_pylist(rows, schema or table.schema), {})
    with pytest.raises(ValueError, match="is not a valid clip key"):
        run(made, Pack(captions=None, motion=False))
    assert not list(tmp_path.glob("*packed*"))


def test_memory_does_not_grow_with_the_shard(tmp_path: Path) -> None:
    def peak(clips: int) -> int:
        made = make_inputs(
            tmp_path / str(clips),
            [Clip(f"c{i}", frames=6, width=160, height=120, captions=["x"]) for i in range(clips)],
        )
        tracemalloc.start()
        run(made)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found - size_of_rows(clips)

    def size_of_rows(clips: int) -> int:
        return 8000 * clips  # the rows of both indexes are in memory, a few kilobytes per clip

    assert peak(40) < peak(5) + 100_000


# ------------------------------------------------------------------------------------------------------ the row helpers


def test_written_rows_come_back_and_the_receipt_with_them(tmp_path: Path) -> None:
    schema = pa.schema({"key": pa.string(), "map": pa.list_(pa.float16()), "plain": pa.list_(pa.int32())})
    rows = [
        {"key": str(i), "map": None if i % 3 == 1 else np.arange(i, dtype=np.float16), "plain": [i] * i}
        for i in range(8)
    ]
    path = tmp_path / "rows.parquet"
    assert write_rows(path, schema, iter(rows), {"stage": "test"}, group=3) == 8
    assert read_receipt(path) == {"stage": "test"}
    for found, row in zip(stream_rows(path, ("map",)), rows, strict=True):
        assert (found["key"], found["plain"]) == (row["key"], row["plain"])
        assert (found["map"] is None) == (row["map"] is None)
        assert row["map"] is None or np.array_equal(found["map"], row["map"])


def test_a_torn_table_is_named(tmp_path: Path) -> None:
    (tmp_path / "torn.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"torn\.parquet: cannot be read"):
        list(stream_rows(tmp_path / "torn.parquet"))
