"""Times of frames: rising, those of the ffmpeg program, and the same for a clip as for the whole file."""

import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from synthetic_videos import X264, ffmpeg, make_pan, make_video, times_by_program

from stm.jobs.status import Status
from stm.preprocess.video.reader import Video
from stm.preprocess.video.timestamps import FrameTimes

FRAMES = 40
B_FRAMES = (*X264, "-bf", "3", "-b_strategy", "0", "-g", "20")


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    return make_pan(FRAMES, 1, 1, 64, 48)


def times_of(path: Path, start: float | None = None, end: float | None = None) -> list[float]:
    with Video(path, start, end) as video:
        return [frame.seconds for frame in video.frames()]


def statuses(path: Path, start: float | None = None, end: float | None = None) -> list[Status]:
    with Video(path, start, end) as video:
        list(video.frames())
        return [note.status for note in video.notes]


def assert_clips_are_parts_of_the_whole(path: Path, times: list[float]) -> None:
    for start, end in ((0.31, 0.9), (0.8, 1.21), (times[-1] - 0.5, None), (0.99, times[-1] + 1)):
        inside = [t for t in times if t >= start - 1e-6 and (end is None or t < end - 1e-6)]
        assert len(inside) > 3
        assert times_of(path, start, end) == pytest.approx(inside, abs=1e-6), (start, end)


CODINGS = {
    "decoding_times_only.avi": B_FRAMES,
    "packed.avi": ("-c:v", "libxvid", "-bf", "2", "-g", "20"),  # a B-frame shares the packet of the P-frame before it
    "packed.mkv": ("-c:v", "libxvid", "-bf", "2", "-g", "12"),
    "b_frames.avi": ("-c:v", "mpeg4", "-bf", "2", "-g", "20"),
    "null_chunks.avi": ("-vf", "select=not(eq(mod(n\\,3)\\,1))", "-fps_mode", "vfr", *B_FRAMES),
    "b_frames.mkv": B_FRAMES,
    "b_frames.mov": B_FRAMES,
    "b_frames.ts": B_FRAMES,
    "b_frames.flv": B_FRAMES,
    "b_frames.mpg": ("-c:v", "mpeg2video", "-bf", "2"),
    "windows.wmv": ("-c:v", "wmv2"),
    "raw.h264": B_FRAMES,
    "ntsc.avi": ("-r", "30000/1001", *B_FRAMES),
}


@pytest.mark.parametrize("name", CODINGS)
def test_times_rise_and_are_those_of_the_ffmpeg_program(name: str, frames: np.ndarray, tmp_path: Path) -> None:
    path = make_video(tmp_path / name, frames, CODINGS[name])
    times, expected = times_of(path), np.array(times_by_program(path))
    assert (np.diff(times) > 0).all()
    assert len(times) == len(expected)
    # Where the program's own times run back (packed frames outside AVI), ours cannot be equal.
    rising = expected >= np.maximum.accumulate(expected)
    assert np.array(times)[rising] == pytest.approx(expected[rising], abs=2e-3)
    assert rising.all() == (name != "packed.mkv")
    assert_clips_are_parts_of_the_whole(path, times)


def test_a_clip_of_decoding_times_has_its_frames(frames: np.ndarray, tmp_path: Path) -> None:
    path = make_video(tmp_path / "b.avi", frames, B_FRAMES)
    whole = np.arange(FRAMES) * 0.04 + 0.08  # as the program: two frames late, because the decoder waits for two
    assert times_of(path) == pytest.approx(whole)
    assert times_of(path, 0.79, 1.17) == pytest.approx(whole[18:28])
    assert statuses(path) == []


def times_of_stamps(
    stamps: Sequence[tuple[int | None, int | None]], duration: int = 1, invented: bool = False, rate: int | None = 25
) -> list[int]:
    """Times in ticks of 40 ms that frames with these presentation and decoding times are given."""
    flags = av.format.Flags.no_timestamps.value if invented else 0
    stream = SimpleNamespace(time_base=Fraction(1, 25), codec_context=SimpleNamespace(framerate=rate))
    times = FrameTimes(SimpleNamespace(format=SimpleNamespace(flags=flags)), stream)
    return [times.of(SimpleNamespace(pts=pts, dts=dts, duration=duration)) for pts, dts in stamps]


def test_the_decoding_times_are_used_once_the_presentation_times_have_run_back_more_often() -> None:
    assert times_of_stamps([(0, 0), (3, 1), (2, 2), (9, 3), (20, 6)]) == [0, 3, 4, 5, 6]
    assert times_of_stamps([(0, 0), (1, 0), (2, 0), (3, 0)]) == [0, 1, 2, 3]
    assert times_of_stamps([(None, 2), (None, 3), (None, None), (None, None)]) == [2, 3, 4, 5]


def test_a_frame_without_a_time_follows_after_the_usual_interval() -> None:
    # A duration of one tick is ffmpeg's guess if the frames are further apart.
    assert times_of_stamps([(0, 0), (4, 4), (8, 8), (None, None)]) == [0, 4, 8, 12]
    assert times_of_stamps([(0, 0), (2, 2), (None, None)], duration=2) == [0, 2, 4]
    # A raw stream has only the rate in its headers.
    assert times_of_stamps([(7, 7), (9, 9), (90, 90)], duration=3, invented=True) == [0, 1, 2]
    assert times_of_stamps([(7, 7), (9, 9), (90, 90)], duration=3, invented=True, rate=None) == [0, 3, 6]


def test_one_wrong_time_does_not_shift_the_rest() -> None:
    wrong = [(n, n) for n in range(50)]
    wrong[30] = (2, 2)
    assert times_of_stamps(wrong) == list(range(50))
    again = [(n % 25, n % 25) for n in range(50)]
    assert times_of_stamps(again) == list(range(50))


# -------------------------------------------------------------------------------------- times that start again


def join(path: Path, *parts: Path) -> Path:
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    return path


@pytest.mark.parametrize("ending", ["ts", "mpg", "ogv", "flv", "h264"])
def test_times_continue_where_files_were_joined(ending: str, frames: np.ndarray, tmp_path: Path) -> None:
    codec = {"mpg": ("-c:v", "mpeg2video", "-bf", "2"), "ogv": ("-c:v", "libtheora")}.get(ending, B_FRAMES)
    part = make_video(tmp_path / f"part.{ending}", frames, codec)
    short = make_video(tmp_path / f"short.{ending}", frames[:13], codec)
    path = join(tmp_path / f"joined.{ending}", part, short, part)
    times = times_of(path)
    assert times == pytest.approx(times_by_program(path), abs=2e-3)
    assert (np.diff(times) > 0).all()
    assert_clips_are_parts_of_the_whole(path, times)


def test_a_transport_stream_joined_to_a_later_one_continues_as_in_the_ffmpeg_program(
    frames: np.ndarray, tmp_path: Path
) -> None:
    part = make_video(tmp_path / "part.ts", frames, B_FRAMES)
    for offset in ("7", "60"):  # a gap in the recording, and a jump
        later = tmp_path / f"later{offset}.ts"
        ffmpeg("-i", part, "-c", "copy", "-output_ts_offset", offset, later)
        for parts in ((part, later), (later, part)):
            path = join(tmp_path / "joined.ts", *parts)
            assert times_of(path) == pytest.approx(times_by_program(path), abs=2e-3)


@pytest.mark.parametrize("ending", ["ts", "mpg"])
def test_times_continue_where_the_counter_of_an_mpeg_stream_wraps(
    ending: str, frames: np.ndarray, tmp_path: Path
) -> None:
    codec = {"ts": B_FRAMES, "mpg": ("-c:v", "mpeg2video", "-bf", "2")}[ending]
    part = make_video(tmp_path / f"part.{ending}", frames, codec)
    path = tmp_path / f"wrapped.{ending}"
    ffmpeg("-i", part, "-c", "copy", "-output_ts_offset", str(2**33 / 90000 - 2.2), path)
    assert times_of(path) == pytest.approx(np.arange(FRAMES) * 0.04, abs=2e-3)
    assert_clips_are_parts_of_the_whole(path, times_of(path))


@pytest.mark.parametrize("ending", ["mkv", "webm"])
def test_joined_matroska_files_continue_although_the_program_starts_again(
    ending: str, frames: np.ndarray, tmp_path: Path
) -> None:
    codec = {"mkv": B_FRAMES, "webm": ("-c:v", "libvpx-vp9", "-deadline", "realtime", "-cpu-used", "8")}[ending]
    part = make_video(tmp_path / f"part.{ending}", frames, codec)
    path = join(tmp_path / f"joined.{ending}", part, part)
    times = times_of(path)
    assert times == pytest.approx(np.arange(2 * FRAMES) * 0.04, abs=2e-3)
    assert_clips_are_parts_of_the_whole(path, times)


def set_edits(path: Path, edits: list[tuple[int, int]]) -> None:
    """Replace the edit list of an mp4 whose index is at its end; (duration in ms, start in the track's time base)."""
    data = bytearray(path.read_bytes())
    at = data.index(b"elst")
    body = struct.pack(">II", 0, len(edits)) + b"".join(struct.pack(">IiI", *edit, 1 << 16) for edit in edits)
    old = struct.unpack_from(">I", data, at - 4)[0]
    data[at + 4 : at - 4 + old] = body
    for box in (b"elst", b"edts", b"trak", b"moov"):
        place = data.rindex(box, 0, at + 4) - 4
        struct.pack_into(">I", data, place, struct.unpack_from(">I", data, place)[0] + 8 + len(body) - old)
    path.write_bytes(data)


def test_an_edit_list_of_two_parts_is_complete_and_its_times_follow_each_other(
    frames: np.ndarray, tmp_path: Path
) -> None:
    path = make_video(tmp_path / "edits.mp4", frames, B_FRAMES)
    delay = 1024  # two frames of 512 ticks, between decoding and display
    set_edits(path, [(400, delay), (600, delay + 25 * 512)])
    times = times_of(path)
    assert times == pytest.approx(times_by_program(path), abs=2e-3)
    assert times == pytest.approx(np.arange(25) * 0.04, abs=2e-3)
    assert statuses(path) == [Status.EDIT_LIST]


def test_the_last_frames_of_joined_streams_follow_the_others(frames: np.ndarray, tmp_path: Path) -> None:
    parts = [
        make_video(tmp_path / "b_frames.ts", frames[:20], B_FRAMES),
        make_video(tmp_path / "fast.ts", frames[:20], (*X264, "-profile:v", "baseline"), rate=50),
        make_video(tmp_path / "late.ts", frames[:20], (*X264, "-bf", "0", "-output_ts_offset", "100")),
    ]
    path = tmp_path / "joined.ts"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    times = times_of(path)
    assert len(times) == 60
    assert np.diff(times)[40:] == pytest.approx(np.full(19, 0.04), abs=2e-3)
    program = times_by_program(path)
    assert times[:58] == pytest.approx(program[:58], abs=2e-3)
    assert program[58] < program[57]  # the program's last times run back
