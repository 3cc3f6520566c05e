"""`truncated` is evidence that bytes are missing, whatever counts and durations a container estimates."""

from contextlib import suppress
from pathlib import Path

import av
import numpy as np
import pytest
from synthetic_videos import X264, ffmpeg, make_pan, make_video

from stm.jobs.status import Status
from stm.preprocess.video.container import VideoError
from stm.preprocess.video.reader import Video

FRAMES = 40
VP9 = ("-c:v", "libvpx-vp9", "-deadline", "realtime", "-cpu-used", "8")
FRAGMENTS = (*X264, "-g", "10", "-movflags", "frag_keyframe+empty_moov")


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    return make_pan(FRAMES, 1, 1, 64, 48)


def read(path: Path, start: float | None = None, end: float | None = None) -> tuple[int, list[Status], str]:
    with Video(path, start, end) as video:
        count = sum(1 for _ in video.frames())
        return count, [note.status for note in video.notes], "; ".join(note.detail for note in video.notes)


def make_streamed(path: Path, frames: np.ndarray) -> Path:
    """A WebM without duration, index and sizes, as a browser records it."""
    whole = make_video(path.with_name("seekable.webm"), frames, VP9)
    path.write_bytes(ffmpeg("-i", whole, "-c", "copy", "-f", "webm", "-"))
    return path


CODINGS = {
    "front.mp4": (*X264, "-movflags", "+faststart"),
    "fragments.mp4": FRAGMENTS,
    "h264.mkv": X264,
    "vp9.webm": VP9,
    "streamed.webm": (),
    "mpeg4.avi": ("-c:v", "mpeg4", "-bf", "2"),
    "h264.ts": X264,
    "h264.m2ts": X264,
    "windows.wmv": ("-c:v", "wmv2"),
    "theora.ogv": ("-c:v", "libtheora"),
    "flash.flv": ("-c:v", "flv"),
    "h264.flv": X264,
    "program.mpg": ("-c:v", "mpeg2video"),
    "animation.gif": (),
    "material.mxf": ("-c:v", "mpeg2video"),
}


@pytest.mark.parametrize("name", CODINGS)
def test_a_file_is_truncated_where_it_was_cut_and_only_then(name: str, frames: np.ndarray, tmp_path: Path) -> None:
    make = make_streamed if name == "streamed.webm" else lambda path, images: make_video(path, images, CODINGS[name])
    path = make(tmp_path / name, frames)
    data = path.read_bytes()
    assert read(path)[:2] == (FRAMES, [])
    for junk in (b"\n", bytes(1000), bytes(9000), b"<html>404</html>" * 9):
        path.write_bytes(data + junk)
        assert read(path)[:2] == (FRAMES, [])
    for share in (0.46, 0.501, 0.55, 0.71):
        path.write_bytes(data[: round(len(data) * share)])
        count, statuses, detail = read(path)
        assert count < FRAMES
        assert statuses[0] is Status.TRUNCATED, share
        assert Status.VARIABLE_RATE not in statuses
        assert detail.startswith("the file is cut off: decoding ended after")


LOST = ["fragments.mp4", "h264.mkv", "vp9.webm", "streamed.webm", "mpeg4.avi", "h264.ts", "h264.m2ts", "theora.ogv"]


@pytest.fixture(scope="module")
def large() -> np.ndarray:
    """Frames whose files are far larger than the zeros that are searched for."""
    return np.random.default_rng(1).integers(0, 256, (FRAMES, 96, 128, 3)).astype(np.uint8)


@pytest.mark.parametrize("name", [*LOST, "front.mp4", "windows.wmv", "h264.flv", "program.mpg", "material.mxf"])
def test_a_download_that_reserved_its_space_and_was_not_finished_is_truncated(
    name: str, large: np.ndarray, tmp_path: Path
) -> None:
    make = make_streamed if name == "streamed.webm" else lambda path, images: make_video(path, images, CODINGS[name])
    path = make(tmp_path / name, large)
    data = path.read_bytes()
    for share in (0.463, 0.712):
        received = round(len(data) * share)
        path.write_bytes(data[:received] + bytes(len(data) - received))
        count, statuses, _ = read(path)
        assert count < FRAMES
        assert statuses[0] is Status.TRUNCATED, share


@pytest.mark.parametrize("name", LOST)
def test_a_hole_in_a_file_is_no_property_of_its_frame_rate(name: str, large: np.ndarray, tmp_path: Path) -> None:
    make = make_streamed if name == "streamed.webm" else lambda path, images: make_video(path, images, CODINGS[name])
    path = make(tmp_path / name, large)
    data = path.read_bytes()
    hole = len(data) // 4
    for share in (0.33, 0.52):
        begin = round(len(data) * share)
        path.write_bytes(data[:begin] + bytes(hole) + data[begin + hole :])
        _, statuses, _ = read(path)
        assert statuses[0] in (Status.TRUNCATED, Status.CORRUPT_FRAMES), share
        assert Status.VARIABLE_RATE not in statuses


@pytest.mark.parametrize("name", ["vp9.webm", "h264.mkv"])
def test_damage_at_which_the_reader_of_a_matroska_file_gives_up_is_noticed(
    name: str, large: np.ndarray, tmp_path: Path
) -> None:
    path = make_video(tmp_path / name, large, (*CODINGS[name], "-g", "10", "-cluster_time_limit", "400"))
    data = path.read_bytes()
    for share in (0.31, 0.52, 0.77):
        begin = round(len(data) * share)
        noise = np.random.default_rng(2).integers(0, 256, len(data) // 5).astype(np.uint8).tobytes()
        path.write_bytes(data[:begin] + noise + data[begin + len(noise) :])
        count, statuses, _ = read(path)
        assert count < FRAMES
        assert statuses[0] in (Status.TRUNCATED, Status.CORRUPT_FRAMES), share
        assert Status.VARIABLE_RATE not in statuses
        # Clips before the damage are not affected.
        assert read(path, 0.0, 0.2)[:2] == (5, [])


def test_transparency_beside_the_blocks_is_no_damage(large: np.ndarray, tmp_path: Path) -> None:
    path, rgba = tmp_path / "alpha.webm", np.concatenate([large, large[..., :1]], -1)
    raw = ("-f", "rawvideo", "-pix_fmt", "rgba", "-s", "128x96", "-r", "25", "-i", "-")
    ffmpeg(*raw, *VP9, "-pix_fmt", "yuva420p", path, data=rgba.tobytes())
    assert read(path)[:2] == (FRAMES, [])


def test_black_frames_without_compression_are_no_lost_bytes(tmp_path: Path) -> None:
    black = np.zeros((FRAMES, 96, 128, 3), np.uint8)
    for name in ("black.mov", "black.avi", "black.mkv"):
        path = tmp_path / name
        raw = ("-f", "rawvideo", "-pix_fmt", "bgr24", "-s", "128x96", "-r", "25", "-i", "-")
        codec = ("-c:v", "rawvideo", *(("-pix_fmt", "rgb24") if name == "black.mov" else ()))
        ffmpeg(
            *raw,
            *codec,
            *(("-allow_raw_vfw", "1") if name == "black.mkv" else ()),
            "-movflags",
            "+faststart",
            path,
            data=black.tobytes(),
        )
        assert read(path)[:2] == (FRAMES, []), name


def test_an_mp4_is_not_truncated_by_the_loss_of_sound_alone_but_by_that_of_one_frame(
    frames: np.ndarray, tmp_path: Path
) -> None:
    silent, sound, front = (tmp_path / name for name in ("silent.mp4", "sound.mp4", "front.mp4"))
    make_video(silent, frames)
    ffmpeg(
        "-i", silent, "-f", "lavfi", "-i", "sine=d=4", "-c:v", "copy", "-c:a", "aac", "-movflags", "+faststart", sound
    )
    sound.write_bytes(sound.read_bytes()[:-1])  # the sound is longer, so its packets are the last
    assert read(sound)[:2] == (FRAMES, [])
    ffmpeg("-i", silent, "-c", "copy", "-movflags", "+faststart", front)
    front.write_bytes(front.read_bytes()[:-1])
    _, statuses, detail = read(front)
    assert statuses[0] is Status.TRUNCATED
    assert f"of {FRAMES} frames" in detail


def test_a_cut_through_the_index_of_an_mp4_is_refused_or_truncation(frames: np.ndarray, tmp_path: Path) -> None:
    path = make_video(tmp_path / "front.mp4", frames, CODINGS["front.mp4"])
    data, opened = path.read_bytes(), 0
    for length in range(data.index(b"stsc"), data.index(b"mdat"), 4):
        path.write_bytes(data[:length])
        with suppress(VideoError):
            assert read(path)[:2] == (0, [Status.TRUNCATED]), length
            opened += 1
    assert opened


def test_an_avi_cut_between_two_frames_is_truncated(frames: np.ndarray, tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.avi", frames, CODINGS["mpeg4.avi"])
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"00dc", len(data) // 2)])
    assert read(path)[1][0] is Status.TRUNCATED


def test_a_matroska_file_that_lacks_the_end_of_its_index_has_all_its_frames(frames: np.ndarray, tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mkv", frames, X264)
    path.write_bytes(path.read_bytes()[:-5])
    assert read(path)[:2] == (FRAMES, [])


def test_frames_that_are_not_read_because_of_lost_sound_are_noticed(frames: np.ndarray, tmp_path: Path) -> None:
    silent, path = make_video(tmp_path / "silent.mp4", frames), tmp_path / "sound.mp4"
    ffmpeg("-i", silent, "-f", "lavfi", "-i", "sine=d=1.6", "-c:v", "copy", "-c:a", "aac", path)
    data = bytearray(path.read_bytes())
    table = data.rindex(b"stco")  # where the chunks of the sound begin
    count = int.from_bytes(data[table + 8 : table + 12], "big")
    data[table + 12 : table + 12 + 4 * count] = (len(data) + 1000).to_bytes(4, "big") * count
    path.write_bytes(data)
    read_frames, statuses, _ = read(path)
    assert read_frames < FRAMES
    assert statuses == [Status.TRUNCATED]


# ------------------------------------------------------------------------------------------- estimates that mislead


def test_a_reader_that_ends_with_an_error_number_has_reached_the_end(frames: np.ndarray, tmp_path: Path) -> None:
    longer = np.concatenate([frames, frames[:20]])
    path = make_video(tmp_path / "material.gxf", longer, ("-c:v", "mpeg2video", "-s", "720x576"))
    count, statuses, _ = read(path)
    assert count == len(longer) and Status.TRUNCATED not in statuses


def test_null_chunks_of_an_avi_are_no_lost_frames(frames: np.ndarray, tmp_path: Path) -> None:
    options = ("-vf", "select=not(eq(mod(n\\,3)\\,1))", "-fps_mode", "vfr", "-c:v", "mpeg4")
    path = make_video(tmp_path / "dropped.avi", frames, options)
    assert read(path)[:2] == (27, [Status.VARIABLE_RATE])
    assert read(path, 0.5, 3.0)[1] == [Status.VARIABLE_RATE]


def test_a_falling_rate_does_not_truncate_a_matroska_file(frames: np.ndarray, tmp_path: Path) -> None:
    options = ("-vf", "setpts=if(lt(N\\,25)\\,N/25\\,1+(N-25)/2.5)/TB", "-fps_mode", "vfr", *X264)
    path = make_video(tmp_path / "slow.mkv", frames, options)
    count, statuses, detail = read(path)
    assert (count, statuses) == (FRAMES, [Status.VARIABLE_RATE])
    assert detail == "neighbouring frames are 40.0 to 440.0 ms apart"


def test_a_picture_that_begins_after_the_sound_is_complete(frames: np.ndarray, tmp_path: Path) -> None:
    silent, path = make_video(tmp_path / "silent.mkv", frames), tmp_path / "late.mkv"
    ffmpeg("-f", "lavfi", "-i", "sine=d=5", "-itsoffset", "3", "-i", silent, "-map", "1:v", "-map", "0:a",
           "-c:v", "copy", "-c:a", "aac", path)  # fmt: skip
    assert read(path)[:2] == (FRAMES, [])
    assert read(path, 3.0, 6.0)[:2] == (FRAMES, [])
    with Video(path) as video:
        assert next(iter(video.frames())).seconds == pytest.approx(3.0, abs=0.03)  # 0.023 s: the encoder's delay


@pytest.mark.parametrize("name", ["whole.mp4", "streamed.webm", "whole.mkv", "whole.avi", "whole.ts", "whole.flv"])
def test_an_annotated_end_behind_that_of_the_file_is_no_truncation(
    name: str, frames: np.ndarray, tmp_path: Path
) -> None:
    path = tmp_path / name
    make_streamed(path, frames) if name == "streamed.webm" else make_video(
        path, frames, ("-c:v", "mpeg4" if not name.endswith("flv") else "flv")
    )
    assert read(path, 0.5, 30.0)[:2] == (FRAMES - 13, [])
    assert read(path, 25.0, 30.0)[:2] == (0, [])


def _end_of_frame(path: Path, number: int) -> int:
    """The position of the byte after a frame in a file without B-frames."""
    with av.open(str(path)) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][number]
        assert packet.pos is not None
        return packet.pos + packet.size


def test_a_clip_that_ends_with_the_last_frame_before_the_cut_is_complete(frames: np.ndarray, tmp_path: Path) -> None:
    whole = make_video(tmp_path / "whole.mp4", frames, (*X264, "-bf", "0", "-g", "10", "-movflags", "+faststart"))
    path = tmp_path / "cut.mp4"
    path.write_bytes(whole.read_bytes()[: whole.stat().st_size * 6 // 10])
    with Video(path) as video:
        last = max(frame.seconds for frame in video.frames() if not frame.corrupt)
        end = last + 0.04
    path.write_bytes(whole.read_bytes()[: _end_of_frame(whole, round(last / 0.04))])
    assert Status.TRUNCATED not in read(path, 0.0, end)[1]
    assert Status.TRUNCATED not in read(path, 0.0, last - 0.04)[1]
    assert read(path, 0.0, last + 0.2)[1][0] is Status.TRUNCATED
    count, statuses, detail = read(path, last + 0.3, last + 0.5)
    assert (count, statuses) == (0, [Status.TRUNCATED])
    assert detail.startswith("the file is cut off: its last frame is before the clip; the clip is")
