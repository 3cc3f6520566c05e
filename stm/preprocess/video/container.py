"""Opening a video file safely, and metadata as reported by its container."""

from pathlib import Path
from typing import Any

import av

from stm.datasets import display
from stm.datasets.media import is_from_machine, open_media
from stm.datasets.probe import AnimatedImageError, open_arguments
from stm.jobs.status import Status


class VideoError(Exception):
    """A video file that cannot be read at all."""

    def __init__(self, status: Status, detail: str) -> None:
        super().__init__(f"{status}: {detail}")
        self.status = status
        self.detail = detail


def open_container(path: Path) -> Any:
    """Open a video, or an image as a video of one frame.

    Raises:
        VideoError: the file is missing, empty or of an unknown format.
        OSError: the disk or the network fails.
    """
    # ffmpeg's log is switched off, because its Python callback can deadlock a worker.
    av.logging.restore_default_callback()
    av.logging.set_libav_level(av.logging.FATAL)
    try:
        exists = path.is_file()
    except OSError as error:
        if is_from_machine(error):
            raise
        # The name is too long: a problem of the clip, so the stage must continue.
        raise VideoError(Status.MISSING_FILE, f"cannot be looked up: {error.strerror}") from None
    if not exists:
        raise VideoError(Status.MISSING_FILE, "no such file")
    if path.stat().st_size == 0:
        raise VideoError(Status.EMPTY_FILE, "the file has no bytes")
    try:
        container = open_media(path, **open_arguments(path))
    except AnimatedImageError as error:
        raise VideoError(Status.OPEN_FAILED, str(error)) from None
    except (av.error.FFmpegError, OSError, UnicodeError) as error:
        if is_from_machine(error):
            raise
        raise VideoError(Status.OPEN_FAILED, f"no container that ffmpeg can read ({plain_error(error)})") from None
    # PyAV asks ffmpeg to invent missing presentation times. It takes the next packet's decoding time, which is wrong for
    # B-frames, and hides that there is none.
    container.flags &= ~av.container.Flags.gen_pts.value
    return container


def choose_stream(container: Any) -> Any:
    """Return the video stream that players show; see `stm.datasets.display.choose_stream`.

    Raises:
        VideoError: the file has no such stream.
    """
    stream = display.choose_stream(container)
    if stream is None:
        raise VideoError(Status.NO_VIDEO_STREAM, f"{len(container.streams)} streams, none of them video")
    return stream


def hidden_frames(stream: Any) -> int:
    """Return the number of coded frames that the container's edit list hides from players."""
    return sum(entry.is_discard for entry in stream.index_entries)


def plain_error(error: BaseException) -> str:
    """Return an error's message without the file path, which differs between machines and would change the tables."""
    return str(getattr(error, "strerror", None) or type(error).__name__)
