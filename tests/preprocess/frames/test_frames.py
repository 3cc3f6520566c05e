"""The frames stage: stored frames, the index, and the rows of damaged clips."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from synthetic_videos import X264, decode_by_program, ffmpeg, make_pan, make_row, make_video, write_slice

from stm.config import BadInput, Frames
from stm.jobs.status import Status
from stm.manifest import TooManyFailures
from stm.preprocess.clip_outcomes import Note, decide, pack_record, unpack_record
from stm.preprocess.frames.extract import extract_frames, read_frames, read_jpegs, read_kept, stored_size
from stm.storage.files import sha256_file
from stm.storage.tables import read_table

SETTINGS = Frames(every=4, short_side=64, min_side=32, timeout_seconds=60)
WIDTH, HEIGHT, FRAMES = 160, 96, 24


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of good, odd and bad videos."""
    folder = tmp_path_factory.mktemp("videos")
    pan = make_pan(FRAMES, 2, 1, WIDTH, HEIGHT)
    good = make_video(folder / "good.mp4", pan, [*X264, "-g", "8"])
    make_video(folder / "portrait.webm", make_pan(12, 1, 1, 60, 110), ["-c:v", "libvpx", "-deadline", "realtime"])
    make_video(folder / "one.mp4", pan[:1])
    make_video(folder / "tiny.mp4", make_pan(8, 0, 0, 64, 24))
    make_video(folder / "raw.h264", pan)
    ffmpeg("-display_rotation", "90", "-i", good, "-c", "copy", folder / "turned.mp4")
    ffmpeg("-ss", "0.4", "-i", good, "-c", "copy", folder / "edited.mp4")
    (folder / "torn.mp4").write_bytes(ffmpeg("-i", good, "-c", "copy", "-f", "mp4", "-movflags", "empty_moov", "-"))
    ffmpeg("-i", good, "-c", "copy", "-movflags", "+faststart", folder / "front.mp4")
    whole = (folder / "front.mp4").read_bytes()
    (folder / "torn.mp4").write_bytes(whole[: len(whole) * 6 // 10])
    ffmpeg("-f", "lavfi", "-i", "sine=d=0.3", folder / "sound.mp4")
    (folder / "page.mp4").write_text("<html></html>")
    return folder


ROWS = [
    make_row("good.mp4"),
    make_row("good.mp4", video_id="good part", start=0.2, end=0.6),
    make_row("good.mp4", video_id="behind the end", start=5.0, end=6.0),
    *map(make_row, ["portrait.webm", "one.mp4", "tiny.mp4", "raw.h264", "turned.mp4", "edited.mp4", "torn.mp4"]),
    *map(make_row, ["sound.mp4", "page.mp4", "missing.mp4", "../outside.mp4"]),
]


def extract(root: Path, folder: Path, rows: list[dict[str, Any]], **more: Any) -> dict[str, Mapping[str, Any]]:
    """Run the stage, and return the index's rows by video id."""
    folder.mkdir(parents=True, exist_ok=True)
    slice_path = write_slice(folder / "train-00000.parquet", rows)
    values: dict[str, Any] = {"settings": SETTINGS, "bad_input": BadInput(max_failure_rate=1), "processes": 1} | more
    extract_frames(slice_path, root, folder / "frames.tar", folder / "frames.parquet", **values)
    return {row["video_id"]: row for row in read_table(folder / "frames.parquet").to_pylist()}


@pytest.fixture(scope="module")
def made(root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Mapping[str, Any]]]:
    folder = tmp_path_factory.mktemp("frames")
    return folder, extract(root, folder, ROWS)


# ----------------------------------------------------------------------------------------------- what is stored


def test_every_kth_frame_is_stored_as_the_ffmpeg_program_resizes_it(root: Path, made) -> None:
    folder, rows = made
    row = rows["good.mp4"]
    assert (row["status"], row["kept"], row["frames"]) == ("ok", True, 6)
    assert row["decode_index"] == [0, 4, 8, 12, 16, 20]
    assert row["pts"] == pytest.approx([n * 0.04 for n in row["decode_index"]])
    assert (row["width"], row["height"], row["source_width"], row["source_height"]) == (106, 64, WIDTH, HEIGHT)
    scale = "scale=106:64:flags=area+accurate_rnd+bitexact"
    truth = decode_by_program(root / "good.mp4", 106, 64, "-vf", scale)[::4]
    stored = read_frames(folder / "frames.tar", row)
    assert stored.shape == truth.shape
    lossy: list[Any] = [cv2.imdecode(cv2.imencode(".jpg", f, [cv2.IMWRITE_JPEG_QUALITY, 90])[1], -1) for f in truth]
    ours, peers = (np.abs(other.astype(int) - truth).mean() for other in (stored, np.stack(lossy)))
    assert ours < peers + 0.5  # no loss beyond that of JPEG at this quality


def test_a_part_of_a_video_is_stored_from_its_own_start(made) -> None:
    _, rows = made
    assert rows["good part"]["pts"] == pytest.approx([0.2, 0.36, 0.52])
    assert rows["good part"]["decode_index"] == [0, 4, 8]


def test_rotation_is_applied_and_portrait_kept(root: Path, made) -> None:
    folder, rows = made
    assert (rows["turned.mp4"]["width"], rows["turned.mp4"]["height"]) == (64, 106)
    assert (rows["turned.mp4"]["source_width"], rows["turned.mp4"]["source_height"]) == (HEIGHT, WIDTH)
    upright = read_frames(folder / "frames.tar", rows["good.mp4"]).astype(int)
    turned = read_frames(folder / "frames.tar", rows["turned.mp4"]).astype(int)
    assert np.abs(np.rot90(upright, axes=(1, 2)) - turned).mean() < 6  # the JPEG blocks differ
    assert np.abs(np.rot90(upright, 3, axes=(1, 2)) - turned).mean() > 20
    assert (rows["portrait.webm"]["width"], rows["portrait.webm"]["height"]) == (64, 118)  # enlarged from 60 x 110


@given(width=st.integers(32, 5000), height=st.integers(32, 5000), short=st.integers(32, 512))
def test_the_short_side_is_exact_and_the_long_side_even_and_in_proportion(width: int, height: int, short: int) -> None:
    stored = stored_size(width, height, short)
    assert min(stored) == short or stored[0] == stored[1] == short
    assert (stored[0] >= stored[1]) == (width >= height) or stored[0] == stored[1]
    exact = short * max(width, height) / min(width, height)
    assert max(stored) == short or (max(stored) % 2 == 0 and abs(max(stored) - exact) <= 1)


def test_at_most_max_frames_are_stored(root: Path, tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"max_frames": 3, "every": 1})
    rows = extract(root, tmp_path, [make_row("good.mp4")], settings=settings)
    assert rows["good.mp4"]["decode_index"] == [0, 1, 2]
    assert rows["good.mp4"]["status"] == "ok"


# ------------------------------------------------------------------------------------------------- where it lies


def test_offsets_sizes_and_hashes_are_those_of_the_tar(made) -> None:
    folder, rows = made
    with tarfile.open(folder / "frames.tar") as tar:
        members = {m.name: m for m in tar}
        keys = [name.partition(".")[0] for name in members]
        assert keys == sorted(keys)
        for row in rows.values():
            for number in range(row["frames"]):
                member = members.pop(f"{row['key']}.{number:04d}.jpg")
                assert (member.offset_data, member.size) == (row["offsets"][number], row["sizes"][number])
            if row["kept"]:
                member = members.pop(f"{row['key']}.json")
                described = json.load(io.BytesIO(tar.extractfile(member).read()))
                assert described["pts"] == row["pts"] and described["key"] == row["key"]
        assert members == {}
    one = rows["good.mp4"]
    assert read_jpegs(folder / "frames.tar", one, [2, 0]) == [read_jpegs(folder / "frames.tar", one)[n] for n in (2, 0)]
    assert [sha256_file_of(data) for data in read_jpegs(folder / "frames.tar", one)] == one["sha256"]


def sha256_file_of(data: bytes) -> str:
    import hashlib

    return hashlib.sha256(data).hexdigest()


def test_plain_webdataset_reads_the_tar(made) -> None:
    folder, rows = made
    samples = list(webdataset.WebDataset(str(folder / "frames.tar"), shardshuffle=False))
    kept = [row for row in rows.values() if row["kept"]]
    assert [s["__key__"] for s in samples] == sorted(row["key"] for row in kept)
    assert {s["__key__"]: sum(name.endswith("jpg") for name in s) for s in samples} == {
        r["key"]: r["frames"] for r in kept
    }


def test_the_bytes_depend_neither_on_processes_nor_on_the_run(root: Path, made, tmp_path: Path) -> None:
    folder, _ = made
    extract(root, tmp_path, ROWS, processes=3)
    for name in ("frames.tar", "frames.parquet"):
        assert sha256_file(folder / name) == sha256_file(tmp_path / name)


# -------------------------------------------------------------------------------------------------- bad input


def test_each_clip_of_the_slice_has_one_row_with_its_status(made) -> None:
    _, rows = made
    assert {name: (row["status"], row["policy"], row["kept"]) for name, row in rows.items()} == {
        "good.mp4": ("ok", "keep", True),
        "good part": ("ok", "keep", True),
        "behind the end": ("too_short", "drop", False),
        "portrait.webm": ("ok", "keep", True),
        "one.mp4": ("too_short", "drop", False),
        "tiny.mp4": ("too_small", "drop", False),
        "raw.h264": ("ok", "keep", True),
        "turned.mp4": ("ok", "keep", True),
        "edited.mp4": ("edit_list", "keep", True),
        "torn.mp4": ("truncated", "keep", True),
        "sound.mp4": ("no_video_stream", "drop", False),
        "page.mp4": ("open_failed", "drop", False),
        "missing.mp4": ("missing_file", "drop", False),
        "../outside.mp4": ("path_outside_root", "drop", False),
    }
    for row in rows.values():
        assert len(row["offsets"]) == len(row["sizes"]) == len(row["sha256"]) == len(row["pts"]) == row["frames"]
        assert bool(row["detail"]) == (row["status"] != "ok")
    assert "0 frames to store of 0 decoded from 5.0 to 6.0 s" in rows["behind the end"]["detail"]


def test_only_kept_clips_are_read_back(made) -> None:
    folder, rows = made
    assert [row["video_id"] for row in read_kept(folder / "frames.parquet")] == sorted(
        (name for name, row in rows.items() if row["kept"]), key=lambda name: rows[name]["key"]
    )


def test_a_policy_may_drop_what_is_kept_by_default(root: Path, tmp_path: Path) -> None:
    bad_input = BadInput(policy={Status.EDIT_LIST: "drop", Status.TOO_SHORT: "keep"}, max_failure_rate=1)
    names = ["edited.mp4", "one.mp4", "good.mp4"]
    rows = extract(root, tmp_path, list(map(make_row, names)), bad_input=bad_input)
    assert [rows[name]["kept"] for name in names] == [False, True, True]


def test_policy_fail_stops_the_stage_and_nothing_is_decoded_again_after_it(root: Path, tmp_path: Path) -> None:
    rows = [make_row("good.mp4"), make_row("page.mp4")]
    with pytest.raises(TooManyFailures, match=r"page\.mp4: open_failed"):
        extract(root, tmp_path, rows, bad_input=BadInput(policy={Status.OPEN_FAILED: "fail"}))
    assert extract(tmp_path / "no such folder", tmp_path, rows)["good.mp4"]["kept"]  # from the journal


def test_damaged_pictures_are_left_out_and_the_gap_is_told(root: Path, tmp_path: Path) -> None:
    data = bytearray((root / "front.mp4").read_bytes())
    for place in np.random.default_rng(1).integers(len(data) // 2, len(data), 20):
        data[place] ^= 0xFF
    (tmp_path / "flipped.mp4").write_bytes(data)
    settings = SETTINGS.model_copy(update={"every": 1})
    row = extract(tmp_path, tmp_path / "out", [make_row("flipped.mp4")], settings=settings)["flipped.mp4"]
    assert (row["status"], row["kept"]) == ("corrupt_frames", True)
    damaged = int(row["detail"].split()[0])
    assert damaged > 0 and row["frames"] + damaged <= FRAMES
    assert row["frames"] == len(row["decode_index"]) < row["decode_index"][-1] + 1 or damaged == FRAMES - row["frames"]


def test_the_strictest_policy_decides_and_the_rest_is_told() -> None:
    notes = [Note(Status.TRUNCATED, "a"), Note(Status.EDIT_LIST, "b")]
    assert decide(notes, BadInput(), usable=True) == (Status.TRUNCATED, "keep", "a; edit_list: b")
    strict = BadInput(policy={Status.EDIT_LIST: "drop"})
    assert decide(notes, strict, usable=True) == (Status.EDIT_LIST, "drop", "b; truncated: a")
    assert decide(notes, BadInput(), usable=False).policy == "drop"
    assert decide([], BadInput(), usable=True).status is Status.OK


@given(blobs=st.lists(st.binary(max_size=50), max_size=5), detail=st.text(max_size=30))
def test_a_record_comes_back_as_it_was(blobs: list[bytes], detail: str) -> None:
    record = unpack_record(pack_record({"pts": [0.1, 2 / 3]}, [Note(Status.TRUNCATED, detail)], blobs))
    assert record == ({"pts": [0.1, 2 / 3]}, [Note(Status.TRUNCATED, detail)], blobs)


# ---------------------------------------------------------------------------------------------------- survival


def _stored(journal: Path) -> int:
    """The bytes of the items in a journal."""
    return sum(path.stat().st_size for path in journal.glob("*") if path.name != "lock")


@pytest.mark.slow
def test_a_killed_stage_continues_inside_its_shard_and_ends_with_the_same_bytes(
    root: Path, made, tmp_path: Path
) -> None:
    folder, _ = made
    write_slice(tmp_path / "train-00000.parquet", ROWS)
    code = f"""
from pathlib import Path
from stm.config import BadInput, Frames
from stm.preprocess.frames.extract import extract_frames
out = Path({str(tmp_path)!r})
settings = Frames.model_validate_json({SETTINGS.model_dump_json()!r})
extract_frames(out / "train-00000.parquet", Path({str(root)!r}), out / "frames.tar", out / "frames.parquet",
    settings, BadInput(max_failure_rate=1), 1)
"""
    journal = tmp_path / ".frames.tar.journal"
    with subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[3]) as stage:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and stage.poll() is None:
            if _stored(journal) > 100_000:  # more than one clip
                break
            time.sleep(0.005)
        os.kill(stage.pid, signal.SIGKILL)
    assert _stored(journal) > 100_000
    assert not (tmp_path / "frames.parquet").exists()
    extract(root, tmp_path, ROWS)
    for name in ("frames.tar", "frames.parquet"):
        assert sha256_file(folder / name) == sha256_file(tmp_path / name)
    assert not journal.exists()
    assert [p for p in tmp_path.iterdir() if p.name.endswith(".tmp")] == []


@pytest.mark.slow
def test_a_clip_that_takes_too_long_is_killed_and_marked(root: Path, tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    (videos / "good.mp4").write_bytes((root / "good.mp4").read_bytes())
    make_video(videos / "long.mp4", np.repeat(make_pan(2, 0, 0, 96, 64), 1500, axis=0))
    # Every frame, and large: seconds of work, while the deadline is checked ten times per second.
    settings = SETTINGS.model_copy(update={"timeout_seconds": 1e-3, "every": 1, "short_side": 720})
    rows = extract(videos, tmp_path / "out", [make_row("long.mp4")], settings=settings)
    assert rows["long.mp4"]["status"] == "timeout"
    again = extract(videos, tmp_path / "out", [make_row("good.mp4"), make_row("long.mp4")])
    assert [row["status"] for row in again.values()] == ["ok", "ok"]  # a timeout is retried
