"""Probing files: each kind of bad file gets its own status, and none takes the others with it."""

import errno
import os
import subprocess
import time
from pathlib import Path, PosixPath
from typing import Any

import imageio_ffmpeg
import numpy as np
import pytest

from stm.datasets.moving_shapes.generate import encode
from stm.datasets.probe import probe_file
from stm.datasets.probe_pool import probe_files
from stm.jobs.status import Status
from stm.manifest import hash_ends
from stm.storage.files import sha256_file

LIMITS = {"min_side": 32, "max_side": 4096}


def ffmpeg(*arguments: object) -> None:
    subprocess.run(
        [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *map(str, arguments)], check=True, capture_output=True
    )


def make_video(path: Path, frames: int = 12, width: int = 96, height: int = 64) -> Path:
    noise = np.random.default_rng(0).integers(0, 255, (frames, height, width, 3), np.uint8)
    encode(noise, 12, path)
    return path


def status_of(path: Path) -> Status:
    return Status(probe_file(path, **LIMITS)["status"])


def test_a_good_file_is_described(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4")
    assert probe_file(path, **LIMITS) == {
        "status": "ok",
        "detail": "",
        "fps": 12.0,
        "width": 96,
        "height": 64,
        "codec": "h264",
        "frames": 12,
        "duration": 1.0,
        "bytes": path.stat().st_size,
        "sha256": sha256_file(path),
        "ends_hash": hash_ends(path),
    }


def test_rotation_is_applied_to_the_size(tmp_path: Path) -> None:
    source = make_video(tmp_path / "a.mp4")
    for degrees, size in [(90, (64, 96)), (180, (96, 64)), (270, (64, 96))]:
        turned = tmp_path / f"{degrees}.mp4"
        ffmpeg("-display_rotation", degrees, "-i", source, "-c", "copy", turned)
        facts = probe_file(turned, **LIMITS)
        assert (facts["width"], facts["height"]) == size


def test_raw_h264_is_fine_without_a_duration(tmp_path: Path) -> None:
    ffmpeg("-i", make_video(tmp_path / "a.mp4"), "-c", "copy", "-f", "h264", tmp_path / "a.h264")
    facts = probe_file(tmp_path / "a.h264", **LIMITS)
    assert (facts["status"], facts["codec"], facts["width"]) == ("ok", "h264", 96)
    assert facts["duration"] is None and facts["frames"] is None


@pytest.mark.parametrize("ending", ["avi", "mkv", "mov", "ts", "mpg", "flv", "webm", "3gp", "wmv"])
def test_common_containers_open(ending: str, tmp_path: Path) -> None:
    codec = {"webm": ["-c:v", "libvpx", "-deadline", "realtime"], "3gp": ["-c:v", "mpeg4"]}.get(ending, [])
    path = tmp_path / f"a.{ending}"
    ffmpeg("-i", make_video(tmp_path / "source.mp4"), "-r", 25, *codec, path)
    facts = probe_file(path, **LIMITS)
    assert (facts["status"], facts["width"], facts["height"]) == ("ok", 96, 64), facts


def test_one_frame_is_enough_here(tmp_path: Path) -> None:
    assert probe_file(make_video(tmp_path / "a.mp4", frames=1), **LIMITS)["frames"] == 1


def test_a_file_cut_after_its_index_still_opens_and_one_without_index_does_not(tmp_path: Path) -> None:
    data = make_video(tmp_path / "a.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) // 2])  # the index comes first (faststart): later stages judge
    assert status_of(tmp_path / "cut.mp4") is Status.OK
    (tmp_path / "short.mp4").write_bytes(data[:200])
    assert status_of(tmp_path / "short.mp4") is Status.OPEN_FAILED


SUBTITLES = "1\n00:00:01,000 --> 00:00:02,000\nhello\n\n"
ASS = "[Script Info]\nScriptType: v4.00+\n\n[Events]\nFormat: Layer, Start, End, Text\nDialogue: 0,0:00:01.00,0:00:02.00,hi\n"
PLAYLIST = "#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\n{}\n#EXT-X-ENDLIST\n"


@pytest.mark.parametrize("ending", ["mp4", "txt", "ans", "srt", "ass", "m3u8", "png"])
@pytest.mark.parametrize(
    "content",
    [
        b"just some text\n" * 50,
        SUBTITLES.encode(),
        ASS.encode(),
        b"\x1b[31mcolor\x1b[0m\n" * 40,
        b"<html></html>",
        bytes(5000),
    ],
    ids=["text", "srt", "ass", "ansi", "html", "zeros"],
)
def test_text_is_no_video_whatever_its_name(content: bytes, ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{ending}"
    path.write_bytes(content)
    assert status_of(path) is Status.OPEN_FAILED


@pytest.mark.parametrize("ending", ["mp4", "m3u8"])
def test_a_playlist_does_not_open_other_files(ending: str, tmp_path: Path) -> None:
    ffmpeg("-i", make_video(tmp_path / "secret.mp4"), "-c", "copy", tmp_path / "secret.ts")
    for content in (PLAYLIST.format(tmp_path / "secret.ts"), f"ffconcat version 1.0\nfile {tmp_path}/secret.ts\n"):
        (tmp_path / f"a.{ending}").write_text(content)
        assert status_of(tmp_path / f"a.{ending}") is Status.OPEN_FAILED


def test_images_and_audio_are_not_videos(tmp_path: Path) -> None:
    video = make_video(tmp_path / "a.mp4")
    ffmpeg("-i", video, "-frames:v", 1, tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "image.mp4")
    assert status_of(tmp_path / "image.mp4") is Status.OPEN_FAILED
    ffmpeg("-f", "lavfi", "-i", "sine=duration=1", tmp_path / "sound.mp4")
    facts = probe_file(tmp_path / "sound.mp4", **LIMITS)
    assert facts["status"] is Status.NO_VIDEO_STREAM and "audio" in facts["detail"]
    # To ffmpeg a cover image is a video stream.
    ffmpeg("-i", video, "-frames:v", 1, tmp_path / "cover.jpg")
    cover = ("-map", 0, "-map", 1, "-c:v", "copy", "-disposition:v:0", "attached_pic")
    ffmpeg("-i", tmp_path / "sound.mp4", "-i", tmp_path / "cover.jpg", *cover, tmp_path / "song.mp4")
    assert status_of(tmp_path / "song.mp4") is Status.NO_VIDEO_STREAM


def test_empty_missing_and_odd_files(tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    os.mkfifo(tmp_path / "pipe.mp4")
    assert status_of(tmp_path / "empty.mp4") is Status.EMPTY_FILE
    assert status_of(tmp_path / "none.mp4") is Status.MISSING_FILE
    assert status_of(tmp_path / "pipe.mp4") is Status.OPEN_FAILED  # and does not wait for someone to write
    assert status_of(tmp_path) is Status.OPEN_FAILED


def test_sizes_outside_the_limits(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4")
    small = probe_file(path, min_side=65, max_side=4096)
    assert small["status"] is Status.TOO_SMALL and "96 x 64" in small["detail"] and small["sha256"]
    assert probe_file(path, min_side=64, max_side=96)["status"] is Status.OK
    assert probe_file(path, min_side=32, max_side=95)["status"] is Status.OPEN_FAILED


def test_details_do_not_name_the_folder(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_text("text")
    assert str(tmp_path) not in probe_file(tmp_path / "a.mp4", **LIMITS)["detail"]


class Killer(PosixPath):
    """A file that crashes the process that opens it."""

    def stat(self, **_: Any) -> os.stat_result:
        os.abort()


class Sleeper(PosixPath):
    """A file that never opens."""

    def stat(self, **_: Any) -> os.stat_result:
        time.sleep(600)
        raise AssertionError


class Breaker(PosixPath):
    """A file that makes a library raise something that nobody expects."""

    def stat(self, **_: Any) -> os.stat_result:
        raise ZeroDivisionError("odd file")


@pytest.mark.slow
def test_a_file_that_hangs_or_kills_its_process_costs_one_file(tmp_path: Path) -> None:
    good = [make_video(tmp_path / f"{number}.mp4", frames=2) for number in range(4)]
    files = [good[0], Killer("/killer"), good[1], Sleeper("/sleeper"), good[2], Breaker("/breaker"), good[3]]
    results = list(probe_files(files, LIMITS, processes=2, timeout=4.0))
    assert sorted(map(str, files)) == sorted(str(path) for path, _ in results)
    found = {str(path): facts for path, facts in results}
    statuses = [str(found[str(path)]["status"]) for path in files]
    assert statuses == ["ok", "crashed", "ok", "timeout", "ok", "crashed", "ok"]
    assert "4 s" in found["/sleeper"]["detail"] and "ZeroDivisionError" in found["/breaker"]["detail"]


def test_an_unknown_codec_is_reported(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4")
    path.write_bytes(path.read_bytes().replace(b"avc1", b"zzzz"))
    facts = probe_file(path, **LIMITS)
    assert facts["status"] == "open_failed" and "codec" in facts["detail"]


def test_a_colon_in_a_name_is_no_protocol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_video(tmp_path / "concat:a.mp4")
    monkeypatch.chdir(tmp_path)
    assert status_of(Path("concat:a.mp4")) is Status.OK


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EMFILE])
def test_a_read_error_of_the_machine_is_not_a_property_of_the_file(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_video(tmp_path / "a.mp4", frames=2)
    state = path.stat()

    class Failing(PosixPath):
        def stat(self, **_: Any) -> os.stat_result:
            return state

        def open(self, *_: Any, **__: Any) -> Any:
            raise OSError(code, os.strerror(code), str(path))

    with pytest.raises(OSError, match=r"a\.mp4") as caught:
        probe_file(Failing(path), **LIMITS)
    assert caught.value.errno == code
    # A file that may not be read is a property of the file.
    code = errno.EACCES
    assert status_of(Failing(path)) is Status.OPEN_FAILED
