"""An error of the disk or the network while a media file is read is the job's, in every container and at every place."""

import errno
from pathlib import Path

import av
import pytest
from PIL import Image
from synthetic_videos import X264, make_pan, make_video

from stm.datasets import media
from stm.datasets.media import is_from_machine, open_media
from stm.datasets.probe import probe_file
from stm.preprocess.video.container import VideoError
from stm.preprocess.video.orientation import Orientation
from stm.preprocess.video.reader import Video

FRAMES = 40
CODINGS = {
    "a.ts": X264,
    "a.mp4": (*X264, "-g", "10", "-movflags", "+faststart"),
    "a.mkv": (*X264, "-g", "10"),
    "a.avi": ("-c:v", "mpeg4"),
    "a.flv": ("-c:v", "flv"),
    "a.wmv": ("-c:v", "wmv2"),
    "a.mpg": ("-c:v", "mpeg2video"),
    "a.ogv": ("-c:v", "libtheora"),
    "a.h264": X264,
}


def fail_behind(monkeypatch: pytest.MonkeyPatch, offset: int, number: int) -> None:
    """Let every read of a byte at or behind `offset` fail, as from a disk with a bad sector."""
    read = media._Source.__base__.read

    def failing_read(self: media._Source, size: int = -1) -> bytes:
        if self.tell() + max(size, 0) <= offset:
            return read(self, size)
        if self.tell() < offset:
            return read(self, offset - self.tell())
        raise OSError(number, "planted", self.name)

    monkeypatch.setattr(media._Source, "read", failing_read)


@pytest.mark.parametrize("name", CODINGS)
def test_a_failing_disk_is_an_error_and_never_a_short_video(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_video(tmp_path / name, make_pan(FRAMES, 1, 1, 160, 120), CODINGS[name])
    size = path.stat().st_size
    for share in (0.0, 0.4, 0.99):
        fail_behind(monkeypatch, int(size * share), errno.EIO)
        for start in (None, 1.2):
            with pytest.raises(OSError, match="planted") as caught, Video(path, start) as video:
                list(video.frames())
            assert not isinstance(caught.value, av.FFmpegError)
            assert (caught.value.errno, caught.value.filename) == (errno.EIO, str(path))
    fail_behind(monkeypatch, 0, errno.ESTALE)
    with pytest.raises(OSError, match="planted"):
        probe_file(path, 8, 4096)
    monkeypatch.undo()
    assert len(list(Video(path).frames())) == FRAMES


def test_an_error_of_the_kernel_arrives_with_its_path() -> None:
    path = Path("/proc/self/mem")  # nothing is mapped at its first byte: reading it is an input/output error
    if not path.exists():
        pytest.skip("no /proc")
    with pytest.raises(OSError) as caught:
        open_media(path)
    assert (caught.value.errno, caught.value.filename) == (errno.EIO, str(path))


def test_too_many_open_files_is_an_error_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_video(tmp_path / "a.mp4", make_pan(3, 0, 0, 64, 48))

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, "planted", str(path))

    monkeypatch.setattr(media, "_Source", refuse)
    for read in (lambda: Video(path), lambda: probe_file(path, 8, 4096)):
        with pytest.raises(OSError, match="planted"):
            read()


def test_a_failing_disk_does_not_leave_an_image_upright(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, "planted")

    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(OSError, match="planted"):
        Orientation.of_image_file(tmp_path / "a.jpg")


def test_a_file_that_was_cut_off_is_not_taken_for_a_failing_disk(tmp_path: Path) -> None:
    whole = make_video(tmp_path / "whole.mkv", make_pan(10, 0, 0, 64, 48)).read_bytes()
    path = tmp_path / "cut.mkv"
    messages = set()
    for length in range(5, 600, 7):
        path.write_bytes(whole[:length])
        try:
            with Video(path) as video:
                list(video.frames())
        except VideoError as error:
            messages.add(error.detail)
    # What ffmpeg calls an input/output error is here the end of the file.
    assert any("Input/output error" in message for message in messages)


def test_a_position_before_the_file_in_a_damaged_index_is_no_error(tmp_path: Path) -> None:
    path = make_video(tmp_path / "cut.nut", make_pan(FRAMES, 1, 1, 64, 48))
    data = path.read_bytes()
    for length in range(len(data) // 2, len(data), len(data) // 40):
        path.write_bytes(data[:length])
        with Video(path) as video:  # the last bytes, taken for the size of the index, are arbitrary
            assert len(list(video.frames())) > 3


def test_a_title_that_is_not_utf8_is_no_damage(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.avi", make_pan(3, 0, 0, 64, 48), ("-c:v", "mpeg4", "-metadata", "title=Cafe"))
    data = path.read_bytes()
    assert b"Cafe" in data
    path.write_bytes(data.replace(b"Cafe", "Café".encode("latin-1")))
    assert len(list(Video(path).frames())) == 3
    assert probe_file(path, 8, 4096)["status"] == "ok"


def test_an_absurd_size_in_a_file_is_not_taken_for_too_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = av.error.MemoryError(errno.ENOMEM, "Cannot allocate memory")
    assert not is_from_machine(refused)

    def no_memory(*_: object) -> None:
        raise OSError(errno.ENOMEM, "planted")

    monkeypatch.setattr(media.mmap, "mmap", no_memory)
    assert is_from_machine(refused)
    assert not is_from_machine(av.error.OSError(errno.EIO, "Input/output error"))
    assert is_from_machine(OSError(errno.EIO, "Input/output error"))
    assert not is_from_machine(OSError(errno.EACCES, "Permission denied"))
