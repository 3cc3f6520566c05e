"""Sub-clips of one file, read in one pass: the records are those of reading each clip alone."""

import os
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic_videos import X264, ffmpeg, make_pan, make_row, make_video, write_slice

from stm.config import BadInput, Frames, Motion
from stm.preprocess import sub_clips
from stm.preprocess.clip_outcomes import unpack_record
from stm.preprocess.frames import extract
from stm.preprocess.motion import measure
from stm.preprocess.sub_clips import find_sequences, read_sequence, run_sequences
from stm.preprocess.video.reader import Video
from stm.storage.files import sha256_file

FRAMES = 60
B_FRAMES = (*X264, "-g", "12", "-bf", "3")
CODINGS: dict[str, Sequence[str]] = {
    "h264.ts": B_FRAMES,
    "h264.avi": B_FRAMES,
    "mpeg4.avi": ("-c:v", "mpeg4", "-bf", "2", "-g", "12"),
    "flash.flv": ("-c:v", "flv"),
    "mpeg2.mpg": ("-c:v", "mpeg2video", "-bf", "2"),
    "indexed.mp4": B_FRAMES,
}
SETTINGS = Frames(every=2, short_side=64, max_frames=12)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    frames = make_pan(FRAMES, 2, 1, 96, 64)
    for name, coding in CODINGS.items():
        make_video(folder / name, frames, coding)
    ffmpeg("-ss", "0.5", "-i", folder / "indexed.mp4", "-c", "copy", folder / "edited.mp4")
    data = bytearray((folder / "h264.ts").read_bytes())
    (folder / "cut.ts").write_bytes(data[: len(data) * 3 // 4])
    for place in np.random.default_rng(3).integers(len(data) // 8, len(data), 12):
        data[place] ^= 0xFF
    (folder / "flipped.ts").write_bytes(data)
    return folder


class Records(dict[str, bytes]):
    """A journal in memory."""

    def put(self, item: str, data: bytes) -> None:
        self[item] = data


def random_rows(name: str, seed: int) -> list[dict[str, Any]]:
    """Clips that overlap, touch, are empty, or reach behind the end."""
    chosen = random.Random(seed)
    bounds: list[tuple[float | None, float | None]] = [(None, 0.3), (None, None), (2.0, None), (2.2, 9.0), (5.0, 6.0)]
    for _ in range(8):
        start = round(chosen.uniform(0, 2.4), 2)
        bounds.append((start, round(start + chosen.choice([0.01, 0.05, 0.3, 0.7]), 2)))
    edge = 0.0
    while edge < 2.3:
        length = chosen.choice([0.04, 0.08, 0.2, 0.36])
        bounds.append((round(edge, 2), round(edge + length, 2)))
        edge += length
    return [make_row(name, video_id=f"{n}", start=start, end=end) for n, (start, end) in enumerate(bounds)]


@pytest.mark.parametrize("name", [*CODINGS, "edited.mp4", "cut.ts", "flipped.ts"])
def test_clips_read_in_one_pass_have_the_records_of_clips_read_alone(name: str, root: Path) -> None:
    alone, together = Records(), Records()
    rows = random_rows(name, seed=len(name))
    for row in rows:
        extract.extract_clip(extract.FrameTask(row, root, SETTINGS, alone))  # type: ignore[arg-type]
    tasks = [extract.FrameTask(row, root, SETTINGS, together) for row in rows]  # type: ignore[arg-type]
    sequences = find_sequences(tasks)
    for sequence in sequences:
        extract.extract_sequence(sequence)
    assert together.items() <= alone.items()
    # Where seeking is exact, nothing is read in one pass; elsewhere, everything.
    assert len(together) == (0 if name == "indexed.mp4" else sum(map(len, sequences)))
    assert sum(map(len, sequences)) >= len(rows) - 3


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        *((name, "codec") for name in ("h264.ts", "h264.avi", "mpeg2.mpg", "edited.mp4", "flipped.ts")),
        *(("h264.ts", backend) for backend in ("mestimate", "transcode")),
    ],
)
def test_motion_measured_in_one_pass_is_that_of_clips_measured_alone(name: str, backend: str, root: Path) -> None:
    alone, together, frames = Records(), Records(), Records()
    settings = Motion.model_validate({"backend": backend})
    pairs = []
    for row in random_rows(name, 5):
        task = extract.FrameTask(row, root, SETTINGS, frames)  # type: ignore[arg-type]
        extract.extract_clip(task)
        record = unpack_record(frames[task.item])
        if record.blobs:
            pairs.append((row, {**record.header, "frames": len(record.blobs)}))
    for pair in pairs:
        measure.extract_clip(measure.MotionTask(*pair, root, settings, 4, alone))  # type: ignore[arg-type]
    sequences = find_sequences([measure.MotionTask(*p, root, settings, 4, together) for p in pairs])  # type: ignore[arg-type]
    for sequence in sequences:
        measure.extract_sequence(sequence)
    assert together.items() <= alone.items()
    assert len(together) == sum(map(len, sequences)) > 10


def test_a_file_is_read_once_for_all_its_clips(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []

    class Counted(Video):
        def _decode(self) -> Any:
            for image in super()._decode():
                decoded.append(image.pts)
                yield image

    monkeypatch.setattr(sub_clips, "Video", Counted)
    rows = [make_row("h264.ts", video_id=f"{n}", start=n * 0.2, end=n * 0.2 + 0.2) for n in range(12)]
    (sequence,) = find_sequences([extract.FrameTask(row, root, SETTINGS, Records()) for row in rows])  # type: ignore[arg-type]
    extract.extract_sequence(sequence)
    assert FRAMES <= len(decoded) <= FRAMES + 1  # one more to find out that seeking is not possible


@dataclass(frozen=True)
class Task:
    row: dict[str, Any]
    root: Path = Path()


bounds = st.tuples(st.integers(0, 20), st.none() | st.integers(1, 8)).map(
    lambda pair: (float(pair[0]), None if pair[1] is None else float(pair[0] + pair[1]))
)


@given(clips=st.lists(st.tuples(st.sampled_from("ab"), bounds), max_size=20))
def test_sequences_do_not_overlap_and_are_as_few_as_possible(
    clips: list[tuple[str, tuple[float, float | None]]],
) -> None:
    tasks = [Task(make_row(name, video_id=f"{n}", start=b[0], end=b[1])) for n, (name, b) in enumerate(clips)]
    sequences = find_sequences(tasks)
    found = [task.row["video_id"] for sequence in sequences for task in sequence]
    assert len(found) == len(set(found))
    for sequence in sequences:
        assert len(sequence) > 1 and len({task.row["path"] for task in sequence}) == 1
        for first, second in pairwise(sequence):
            assert first.row["end"] is not None and first.row["end"] <= second.row["start"]
    for name in "ab":
        own = [(start, float("inf") if end is None else end) for path, (start, end) in clips if path == name]
        most = max((sum(s <= at < e for s, e in own) for at, _ in own), default=0)
        count = sum(sequence[0].row["path"] == name for sequence in sequences)
        left_out = len(own) - sum(len(s) for s in sequences if s[0].row["path"] == name)
        assert count + left_out == most


# ------------------------------------------------------------------------------------------------- in the stages


def run_frames(root: Path, folder: Path, rows: Sequence[dict[str, Any]]) -> tuple[str, str]:
    folder.mkdir()
    paths = folder / "frames.tar", folder / "frames.parquet"
    write_slice(folder / "train-00000.parquet", rows)
    bad_input = BadInput(max_failure_rate=1)
    extract.extract_frames(folder / "train-00000.parquet", root, *paths, SETTINGS, bad_input, 2)
    return sha256_file(paths[0]), sha256_file(paths[1])


def test_the_stage_reads_each_file_once_and_writes_the_same_bytes(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("h264.ts", "mpeg4.avi")
    rows = [
        make_row(name, video_id=f"{name}-{n}", start=n * 0.25, end=n * 0.25 + 0.25) for name in names for n in range(9)
    ]
    left: list[int] = []

    def run_shard(title: str, function: Any, tasks: Sequence[Any], journal: Any, *more: Any) -> Any:
        journal.refresh()
        left.append(sum(journal.get(task.item) is None for task in tasks))
        return original(title, function, tasks, journal, *more)

    original = extract.run_shard
    monkeypatch.setattr(extract, "run_shard", run_shard)
    together = run_frames(root, tmp_path / "together", rows)
    monkeypatch.setattr(extract, "run_sequences", lambda *_: None)
    alone = run_frames(root, tmp_path / "alone", rows)
    assert left == [0, len(rows)]
    assert together == alone


def crash(tasks: Sequence[Task]) -> None:
    if tasks[0].row["path"] == "crash":
        os.abort()
    raise ZeroDivisionError("odd file")


def test_a_sequence_that_crashes_or_fails_is_left_to_its_clips() -> None:
    rows = [make_row(path, video_id=f"{path}{n}", start=n, end=n + 1) for path in ("crash", "fail") for n in range(3)]
    run_sequences("frames", crash, list(map(Task, rows)), 1, 60.0)


def hang(tasks: Sequence[Task]) -> None:
    for _ in read_sequence(tasks, timeout_seconds=0.5):
        time.sleep(600)


@pytest.mark.slow
def test_a_sequence_that_hangs_is_ended_at_the_deadline_of_one_clip(root: Path) -> None:
    rows = [make_row("h264.ts", video_id=f"{n}", start=n * 0.1, end=n * 0.1 + 0.1) for n in range(20)]
    start = time.monotonic()
    run_sequences("frames", hang, [Task(row, root) for row in rows], 1, timeout_seconds=30.0)
    assert time.monotonic() - start < 60  # 20 clips may take 600 s
