"""The pixels of a window are those that the ffmpeg program decodes, in one pass, for every kind of file."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from small_weights import SIZE, crop_by_hand, decode_by_hand
from synthetic_videos import X264, decode_by_program, ffmpeg, make_pan, make_video

from stm.features.cutting import CropPlan, Restart, Summary, Window
from stm.features.videos import VideoTask, decode_video
from stm.features.windows import WindowPlan
from stm.preprocess.video import random_access
from stm.preprocess.video.container import VideoError
from stm.preprocess.video.reader import DecodedFrame, Video

WIDTH, HEIGHT, SHORT = 128, 96, 48
COUNT = 30
TASK = VideoTask("", None, None, WindowPlan(4, 2, count=3), CropPlan(SIZE), SHORT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("videos")


@pytest.fixture(scope="module")
def video(folder: Path) -> Path:
    """30 frames with B-frames, at 25 frames per second."""
    return make_video(folder / "a.mp4", make_pan(COUNT, width=WIDTH, height=HEIGHT), [*X264, "-bf", "2", "-g", "12"])


def read(path: Path, **changes: object) -> tuple[list[np.ndarray], Summary, int]:
    """The windows of a video [crops, T, 3, S, S], their summary, and how often it was read again."""
    windows: list[np.ndarray] = []
    restarts = 0
    for part in decode_video(replace(TASK, path=str(path), **changes)):  # type: ignore[arg-type]
        if isinstance(part, Window):
            assert part.number == len(windows)
            windows.append(part.video)
        elif isinstance(part, Restart):
            windows, restarts = [], restarts + 1
        elif isinstance(part, Summary):
            summary = part
    return windows, summary, restarts


def by_hand(
    path: Path, frames: list[list[int]], size: tuple[int, int] = (64, SHORT), every: int = 2
) -> list[np.ndarray]:
    cropped = crop_by_hand(decode_by_hand(path, *size, every))
    return [cropped[[index // every for index in window]] for window in frames]


def check(path: Path, status: str = "ok", **changes: object) -> Summary:
    windows, summary, _ = read(path, **changes)
    assert summary.status == status, summary
    expected = by_hand(path, summary.frames)
    assert len(windows) == len(expected) > 0
    for window, truth in zip(windows, expected, strict=True):
        assert np.array_equal(window[0], truth)
    return summary


def test_windows_are_the_programs_frames_bit_for_bit(video: Path) -> None:
    summary = check(video)
    assert summary.frames == [[0, 2, 4, 6], [10, 12, 14, 16], [22, 24, 26, 28]]
    assert np.allclose(summary.seconds, [(0, 0.24), (0.4, 0.64), (0.88, 1.12)])
    sliding = check(video, windows=WindowPlan(4, 2, stride_seconds=0.16))
    assert [window[0] for window in sliding.frames] == [0, 4, 8, 12, 16, 20]


def test_three_crops_lie_along_the_long_side(video: Path) -> None:
    windows, _, _ = read(video, crops=CropPlan(SIZE, 3))
    stored = decode_by_hand(video, 64, SHORT, 2)
    for crop, left in enumerate((0, 8, 16)):
        assert np.array_equal(windows[1][crop], crop_by_hand(stored, left)[[5, 6, 7, 8]])


def test_a_part_of_a_video_counts_its_own_frames(video: Path) -> None:
    windows, summary, _ = read(video, start=0.4, end=0.8)
    assert summary.frames[0] == [0, 2, 4, 6] and summary.seconds[0][0] == pytest.approx(0.4)
    whole = crop_by_hand(decode_by_hand(video, 64, SHORT, 1))
    assert np.array_equal(windows[0][0], whole[[10, 12, 14, 16]])


def test_decord_reads_the_frames_that_the_program_converts_by_default(video: Path) -> None:
    windows, summary, _ = read(video, backend="decord")
    assert summary.frames == read(video)[1].frames
    whole = decode_by_program(video, WIDTH, HEIGHT)[::2]
    shrunk = np.stack([cv2.resize(frame, (64, SHORT), interpolation=cv2.INTER_AREA) for frame in whole])
    for window, frames in zip(windows, summary.frames, strict=True):
        assert np.array_equal(window[0], crop_by_hand(shrunk)[[index // 2 for index in frames]])
    part = read(video, backend="decord", start=0.4, end=0.8)
    assert part[1][:2] == read(video, start=0.4, end=0.8)[1][:2]


def test_seeking_decodes_less_with_the_same_windows(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_video(
        folder / "long.mp4", make_pan(600, dx=0.2, width=WIDTH, height=HEIGHT), [*X264, "-bf", "2", "-g", "25"]
    )
    ffmpeg("-i", path, "-c", "copy", folder / "long.ts")
    decoded: list[int] = []
    frames = Video.frames

    def count(self: Video, **options: bool) -> Iterator[DecodedFrame]:
        yield from frames(self, **options)
        decoded.append(self.decoded)

    monkeypatch.setattr(Video, "frames", count)
    plan = WindowPlan(4, 2, count=4)
    whole, whole_summary, _ = read(path, windows=plan)
    assert decoded == [600]
    decoded.clear()
    sparse, summary, restarts = read(path, windows=plan, backend="pyav-seek")
    assert (summary, restarts) == (whole_summary, 0) and decoded == [7] * 4
    assert all(map(np.array_equal, sparse, whole))
    part = read(path, windows=plan, backend="pyav-seek", start=8.0, end=16.0)
    expected = read(path, windows=plan, start=8.0, end=16.0)
    assert part[1] == expected[1] and all(map(np.array_equal, part[0], expected[0]))
    # Transport streams cannot be sought exactly, and are read as a whole.
    stream = read(folder / "long.ts", windows=plan, backend="pyav-seek")
    assert stream[1].frames == summary.frames and all(map(np.array_equal, stream[0], whole))


def test_decord_is_asked_again_where_it_gives_up_seeking(video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, times: int) -> list[int]:
        calls: list[int] = []
        opened = random_access._open_decord

        class Reader:
            def __init__(self) -> None:
                self.reader = opened(path)

            def __len__(self) -> int:
                return len(self.reader)

            def get_batch(self, numbers: list[int]) -> Any:
                calls.append(len(numbers))
                if len(calls) <= times:
                    os.write(2, b"[12:00:00] video_reader.cc:711: Failed to skip frames effectively at frame 9.")
                return self.reader.get_batch(numbers)

        monkeypatch.setattr(random_access, "_open_decord", lambda path: Reader())
        return calls

    calls = fail(video, 1)
    images = random_access.read_clip(video, [3], backend="decord")
    assert len(calls) == 2 and images.shape == (1, HEIGHT, WIDTH, 3)
    monkeypatch.undo()
    fail(video, 99)
    with pytest.raises(VideoError, match="gave up seeking to frame 3 3 times"):
        random_access.read_clip(video, [3], backend="decord")


@pytest.mark.parametrize("frames", [1, 3])
def test_a_short_video_repeats_its_last_frame(folder: Path, frames: int) -> None:
    path = make_video(folder / f"short{frames}.mp4", make_pan(frames, width=WIDTH, height=HEIGHT))
    for backend in ("pyav", "decord"):
        _, summary, _ = read(path, backend=backend)
        assert summary.status == "ok"
        assert summary.frames == [[0, 0, 0, 0] if frames == 1 else [0, 2, 2, 2]] * 3
    check(path)


def test_a_rotated_video_is_shown_upright(folder: Path, video: Path) -> None:
    path = folder / "turned.mp4"
    ffmpeg("-display_rotation", "90", "-i", video, "-c", "copy", path)
    windows, summary, _ = read(path)
    assert summary.status == "ok"
    upright = np.rot90(decode_by_hand(video, 64, SHORT, 2), axes=(1, 2))
    by_program = decode_by_hand(path, SHORT, 64, 2)
    # The program rotates before it resizes, which places the colours differently: only the direction can be compared.
    right, wrong = (np.abs(each.astype(int) - by_program).mean() for each in (upright, upright[:, ::-1, ::-1]))
    assert 3 * right < wrong
    cropped = np.stack([cv2.resize(frame[8:56], (SIZE, SIZE), interpolation=cv2.INTER_AREA) for frame in upright])
    assert np.array_equal(windows[0][0], cropped.transpose(0, 3, 1, 2)[:4])


def test_a_variable_rate_counts_frames_not_seconds(folder: Path, video: Path) -> None:
    path = folder / "variable.mkv"
    ffmpeg("-i", video, "-vf", "setpts='N*(1+gt(mod(N,3),1))/25/TB'", "-fps_mode", "vfr", *X264, path)
    summary = check(path, status="variable_rate")
    assert summary.frames[0] == [0, 2, 4, 6]


def test_transport_streams_and_edit_lists_are_read_by_pyav_and_refused_by_decord(folder: Path, video: Path) -> None:
    stream, edited = folder / "stream.ts", folder / "edited.mp4"
    ffmpeg("-i", video, "-c", "copy", stream)
    ffmpeg("-ss", "0.5", "-i", video, "-c", "copy", edited)
    check(stream)
    check(edited, status="edit_list")
    undated = folder / "undated.avi"  # its packets have times of decoding only
    ffmpeg("-i", video, "-c", "copy", undated)
    assert read(undated)[1].seconds[0][0] == pytest.approx(0.08)
    cropped = folder / "cropped.mp4"
    ffmpeg("-i", video, "-c", "copy", "-bsf:v", "h264_metadata=crop_left=32", cropped)
    reasons = {stream: "mpegts", edited: "edit list", undated: "first frame at 0.080 s", cropped: "its crop"}
    for path, word in reasons.items():
        _, summary, _ = read(path, backend="decord")
        assert not summary.frames and word in summary.detail and str(folder) not in summary.detail


def test_a_damaged_file_is_read_again_where_its_frames_are_not_those_listed(folder: Path, video: Path) -> None:
    path = folder / "damaged.mkv"
    ffmpeg("-i", video, "-c", "copy", path)
    data = bytearray(path.read_bytes())
    middle = len(data) * 2 // 5
    data[middle : middle + 400] = bytes(400)
    path.write_bytes(data)
    windows, summary, restarts = read(path)
    assert summary.status in ("corrupt_frames", "truncated") and len(windows) == 3
    assert restarts == 1
    # The same windows as over the intact frames alone, all of which the program decodes alike.
    assert all(window == sorted(window) for window in summary.frames)


def test_what_cannot_be_read_says_why(folder: Path, video: Path) -> None:
    sound, text, cut = folder / "sound.mp4", folder / "text.mp4", folder / "cut.mp4"
    ffmpeg("-f", "lavfi", "-i", "sine=duration=1", sound)
    text.write_text("not a video\n" * 40)
    cut.write_bytes(video.read_bytes()[:3000])
    (folder / "empty.mp4").write_bytes(b"")
    found = {name: read(folder / name)[1] for name in ("sound.mp4", "text.mp4", "cut.mp4", "empty.mp4", "missing.mp4")}
    statuses = {name: summary.status for name, summary in found.items()}
    assert statuses == {
        "sound.mp4": "no_video_stream",
        "text.mp4": "open_failed",
        "cut.mp4": "open_failed",
        "empty.mp4": "empty_file",
        "missing.mp4": "missing_file",
    }
    assert all(summary.detail and not summary.frames for summary in found.values())
    _, behind, _ = read(video, start=50.0)
    assert behind.status == "too_short" and "from 50 s" in behind.detail


def test_a_video_whose_size_changes_has_no_windows(folder: Path) -> None:
    sizes = [(WIDTH, HEIGHT), (WIDTH, HEIGHT // 2)]
    parts = [
        make_video(folder / f"{number}.ts", make_pan(12, width=width, height=height))
        for number, (width, height) in enumerate(sizes)
    ]
    path = folder / "changes.ts"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    _, summary, _ = read(path)
    assert summary.status == "size_changes" and not summary.frames
