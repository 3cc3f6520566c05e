"""Decoding: the frames that ffmpeg shows, with their timestamps, and a note for each problem of a file."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from synthetic_videos import X264, decode_by_program, ffmpeg, make_pan, make_video

from stm.jobs.status import Status
from stm.preprocess.video.container import VideoError
from stm.preprocess.video.random_access import read_clip
from stm.preprocess.video.reader import Video, decode

WIDTH, HEIGHT, FRAMES = 160, 120, 30


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    return make_pan(FRAMES, 2, 1, WIDTH, HEIGHT)


@pytest.fixture(scope="module")
def plain(frames: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """H.264 with B-frames, a key frame every 10, index in front."""
    path = tmp_path_factory.mktemp("videos") / "plain.mp4"
    return make_video(path, frames, [*X264, "-g", "10", "-movflags", "+faststart"])


def read_all(path: Path, start: float | None = None, end: float | None = None) -> tuple[np.ndarray, list[float], list]:
    with Video(path, start, end) as video:
        decoded = [(f.image.to_ndarray(format="rgb24"), f.seconds) for f in video.frames()]
        turned = [video.orientation.turn(image) for image, _ in decoded]
        return np.array(turned), [seconds for _, seconds in decoded], video.notes


CODINGS = {
    "plain.mp4": X264,
    "full_range.mkv": (*X264, "-vf", "scale=out_range=full", "-color_range", "pc"),
    "mpeg4.avi": ("-c:v", "mpeg4", "-bf", "2", "-g", "12"),
    "mpeg2.mpg": ("-c:v", "mpeg2video", "-q:v", "3"),
    "transport.ts": X264,
    "vp9.webm": ("-c:v", "libvpx-vp9", "-deadline", "realtime", "-cpu-used", "8"),
    "vp8.webm": ("-c:v", "libvpx", "-deadline", "realtime", "-cpu-used", "8"),
    "hevc.mp4": ("-c:v", "libx265", "-x265-params", "log-level=none"),
    "raw.h264": X264,
    "flash.flv": ("-c:v", "flv"),
}


@pytest.mark.parametrize("name", CODINGS)
def test_decoded_frames_are_those_of_the_ffmpeg_program(name: str, frames: np.ndarray, tmp_path: Path) -> None:
    path = make_video(tmp_path / name, frames, CODINGS[name])
    ours, seconds, notes = read_all(path)
    theirs = decode_by_program(path, WIDTH, HEIGHT)
    assert ours.shape == theirs.shape == frames.shape
    assert np.abs(ours.astype(int) - theirs).mean() < 1
    assert np.diff(seconds) == pytest.approx(np.full(FRAMES - 1, 0.04), abs=0.002)
    assert notes == []


@pytest.mark.parametrize("size", [(121, 87), (64, 200)])
def test_odd_and_portrait_sizes(size: tuple[int, int], tmp_path: Path) -> None:
    width, height = size
    path = make_video(tmp_path / "odd.mkv", make_pan(5, 1, 1, width, height), ["-c:v", "mpeg4"])
    assert np.array_equal(read_clip(path, range(5)), decode_by_program(path, width, height))


@pytest.mark.parametrize(
    "turn", [("-display_rotation", "90"), ("-display_rotation", "180"), ("-display_rotation", "-90"), ("-display_hflip",),
             ("-display_vflip",), ("-display_rotation", "90", "-display_hflip")],
    ids=" ".join,
)  # fmt: skip
def test_turned_videos_are_shown_as_the_ffmpeg_program_shows_them(
    turn: tuple[str, ...], plain: Path, tmp_path: Path
) -> None:
    path = tmp_path / "turned.mp4"
    ffmpeg(*turn, "-i", plain, "-c", "copy", path)
    ours = read_all(path)[0]
    assert np.array_equal(ours, decode_by_program(path, ours.shape[2], ours.shape[1]))
    assert (ours.shape[2] > ours.shape[1]) == ("90" not in turn[-1] and "90" not in turn[:2] and "-90" not in turn)


# ------------------------------------------------------------------------------------------------------ clips


@pytest.mark.parametrize("name", ["plain.mp4", "vp9.webm", "transport.ts", "mpeg4.avi", "raw.h264"])
def test_any_part_of_a_video_has_exactly_the_frames_of_the_whole(name: str, frames: np.ndarray, tmp_path: Path) -> None:
    options = [*CODINGS[name], "-g", "10"]
    path = make_video(tmp_path / name, frames, options)
    whole, seconds, _ = read_all(path)
    for start, end in ((0.0, 0.4), (0.2, 0.5), (0.4, 0.41), (0.39, None), (0.43, 0.81), (1.0, None), (None, 0.3)):
        part, times, _ = read_all(path, start, end)
        inside = [n for n, t in enumerate(seconds) if t >= (start or 0) - 1e-6 and (end is None or t < end - 1e-6)]
        assert times == pytest.approx([seconds[n] for n in inside])
        assert np.array_equal(part, whole[inside])


def test_a_seek_lands_right_when_groups_of_pictures_are_open(frames: np.ndarray, tmp_path: Path) -> None:
    path = make_video(tmp_path / "open.mp4", frames, [*X264, "-g", "8", "-x264-params", "open-gop=1:scenecut=0"])
    whole, seconds, _ = read_all(path)
    for first in range(0, FRAMES, 3):
        part, times, notes = read_all(path, seconds[first], None)
        assert times == pytest.approx(seconds[first:])
        assert np.array_equal(part, whole[first:])
        assert notes == []


def test_frames_are_counted_from_the_start_of_the_clip(plain: Path) -> None:
    assert [frame.index for frame in decode(plain, 0.4, 0.6)] == [0, 1, 2, 3, 4]


def test_surroundings_are_given_without_a_number(plain: Path) -> None:
    with Video(plain, 0.44, 0.6) as video:
        indices = [frame.index for frame in video.frames(surroundings=True)]
    assert [i for i in indices if i >= 0] == [0, 1, 2, 3]
    assert indices[0] == -1 and indices[-1] == -1


# ------------------------------------------------------------------------------------------------------ odd files


def test_a_truncated_file_gives_its_frames_and_then_says_so(plain: Path, tmp_path: Path) -> None:
    path = tmp_path / "torn.mp4"
    path.write_bytes(plain.read_bytes()[: plain.stat().st_size * 6 // 10])
    ours, _, notes = read_all(path)
    assert 5 < len(ours) < FRAMES
    assert notes[0].status is Status.TRUNCATED
    assert f"of {FRAMES} frames" in notes[0].detail
    sound = len(ours) - 4  # the last ones may be damaged, or lack reference frames
    assert np.array_equal(ours[:sound], read_all(plain)[0][:sound])


@pytest.mark.parametrize("name", ["torn.mkv", "torn.webm", "torn.avi"])
def test_truncation_is_noticed_in_containers_that_do_not_mind(name: str, frames: np.ndarray, tmp_path: Path) -> None:
    coding = {"torn.mkv": X264, "torn.webm": CODINGS["vp9.webm"], "torn.avi": CODINGS["mpeg4.avi"]}[name]
    whole = make_video(tmp_path / f"whole_{name}", frames, coding)
    path = tmp_path / name
    path.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    assert read_all(path)[2][0].status is Status.TRUNCATED


def test_a_clip_that_reaches_behind_the_tear_is_truncated_and_one_before_it_is_not(plain: Path, tmp_path: Path) -> None:
    path = tmp_path / "torn.mp4"
    path.write_bytes(plain.read_bytes()[: plain.stat().st_size * 6 // 10])
    assert read_all(path, 0.0, 0.2)[2] == []
    assert read_all(path, 0.4, 1.1)[2][0].status is Status.TRUNCATED


def test_flipped_bytes_are_noticed(plain: Path, tmp_path: Path) -> None:
    data = bytearray(plain.read_bytes())
    for place in np.random.default_rng(0).integers(len(data) // 4, len(data), 40):
        data[place] ^= 0xFF
    path = tmp_path / "flipped.mp4"
    path.write_bytes(data)
    with Video(path) as video:
        damaged = sum(frame.corrupt for frame in video.frames())
        assert damaged > 0
        assert [note.status for note in video.notes] == [Status.CORRUPT_FRAMES]
        assert video.notes[0].detail.startswith(f"{damaged} of {video.decoded} frames")


def test_an_edit_list_hides_frames_as_the_player_hides_them(plain: Path, tmp_path: Path) -> None:
    path = tmp_path / "edited.mp4"
    ffmpeg("-ss", "0.5", "-i", plain, "-c", "copy", path)
    ours, seconds, notes = read_all(path)
    assert np.array_equal(ours, decode_by_program(path, WIDTH, HEIGHT))
    assert len(ours) < FRAMES - 10
    assert seconds[0] == pytest.approx(0, abs=0.05)
    assert [note.status for note in notes] == [Status.EDIT_LIST]
    part, times, _ = read_all(path, 0.2, 0.4)
    chosen = [n for n, t in enumerate(seconds) if 0.2 - 1e-6 <= t < 0.4 - 1e-6]
    assert np.array_equal(part, ours[chosen]) and times == [seconds[n] for n in chosen]


def test_a_variable_rate_is_noticed(frames: np.ndarray, tmp_path: Path) -> None:
    options = [*X264, "-vf", "select=not(eq(mod(n\\,5)\\,3))", "-fps_mode", "vfr"]
    path = make_video(tmp_path / "variable.mp4", frames, options)
    ours, seconds, notes = read_all(path)
    assert [note.status for note in notes] == [Status.VARIABLE_RATE]
    assert len(ours) == FRAMES * 4 // 5
    assert max(np.diff(seconds)) == pytest.approx(0.08)


def test_one_frame_is_a_video(tmp_path: Path) -> None:
    path = make_video(tmp_path / "one.mp4", make_pan(1, 0, 0, 64, 48))
    ours, seconds, notes = read_all(path)
    assert (len(ours), seconds, notes) == (1, [0.0], [])


def test_files_that_are_no_videos(tmp_path: Path) -> None:
    ffmpeg("-f", "lavfi", "-i", "sine=d=0.3", tmp_path / "sound.mp4")
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "page.mp4").write_text("<html><body>404</body></html>")
    expected = {
        "sound.mp4": Status.NO_VIDEO_STREAM,
        "empty.mp4": Status.EMPTY_FILE,
        "page.mp4": Status.OPEN_FAILED,
        "missing.mp4": Status.MISSING_FILE,
    }
    for name, status in expected.items():
        with pytest.raises(VideoError) as error:
            Video(tmp_path / name)
        assert error.value.status is status
        assert str(tmp_path) not in error.value.detail


def test_a_playlist_named_like_a_video_opens_no_other_file(plain: Path, tmp_path: Path) -> None:
    path = tmp_path / "list.mp4"
    path.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\n{plain}\n#EXT-X-ENDLIST\n")
    with pytest.raises(VideoError, match="open_failed"):
        Video(path)
    path.write_text(f"ffconcat version 1.0\nfile '{plain}'\n")
    with pytest.raises(VideoError, match="open_failed"):
        Video(path)


def test_a_colon_in_a_name_is_no_protocol(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("http:clip.mp4").write_bytes(plain.read_bytes())
    assert len(read_all(Path("http:clip.mp4"))[0]) == FRAMES


def test_absurd_dimensions_are_refused_before_decoding(plain: Path) -> None:
    with pytest.raises(VideoError, match=f"{WIDTH} x {HEIGHT} pixels"):
        Video(plain, max_side=WIDTH - 1)


# ----------------------------------------------------------------------------------------------- by their numbers


def test_frames_by_number_are_the_same_with_both_readers(plain: Path) -> None:
    whole = read_all(plain)[0]
    numbers = [17, 3, 3, 29, 0]
    assert np.array_equal(read_clip(plain, numbers), whole[numbers])
    assert np.array_equal(read_clip(plain, numbers, backend="decord"), whole[numbers])


@pytest.mark.parametrize("backend", ["pyav", "decord"])
def test_a_number_behind_the_end_is_an_error(plain: Path, backend: Literal["pyav", "decord"]) -> None:
    with pytest.raises(IndexError, match=f"has {FRAMES} frames; asked for frame {FRAMES}"):
        read_clip(plain, [0, FRAMES], backend=backend)


def test_decord_is_refused_where_it_is_silently_wrong(plain: Path, tmp_path: Path) -> None:
    edited, transport = tmp_path / "edited.mp4", tmp_path / "stream.ts"
    ffmpeg("-ss", "0.5", "-i", plain, "-c", "copy", edited)
    ffmpeg("-i", plain, "-c", "copy", transport)
    for path, word in ((edited, "edit list"), (transport, "mpegts")):
        with pytest.raises(VideoError, match=word):
            read_clip(path, [0], backend="decord")
        assert np.array_equal(read_clip(path, [0, 5]), read_all(path)[0][[0, 5]])


class _LateStreams:
    """An open file as PyAV shows it if streams appear while it is read: ending the unknown streams fails."""

    def __init__(self, container: Any) -> None:
        self._container = container

    def __getattr__(self, name: str) -> Any:
        return getattr(self._container, name)

    def demux(self, *streams: Any) -> Iterator[Any]:
        for packet in self._container.demux(*streams):
            if not packet.size:
                raise IndexError("list index out of range")
            yield packet


def test_streams_that_appear_while_a_file_is_read_do_not_matter(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mkv", make_pan(12, 1, 1, 64, 48))
    with Video(path) as video:
        video._container = _LateStreams(video._container)
        assert len(list(video.frames())) == 12
        assert not video.notes
