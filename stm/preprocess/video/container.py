"""Opening a video file safely, and what its container says about it."""

from pathlib import Path
from typing import Any

import av

from stm.datasets.probe import open_arguments
from stm.jobs.status import Status


class VideoError(Exception):
    """A file of which nothing can be read."""

    def __init__(self, status: Status, detail: str) -> None:
        super().__init__(f"{status}: {detail}")
        self.status, self.detail = status, detail


def open_container(path: Path) -> Any:
    """Opens a video, or a picture as one of a single frame, with ffmpeg's log off: its callback can deadlock a worker.

    Raises:
        VideoError: missing, empty or no container that is known.
    """
    av.logging.restore_default_callback()
    av.logging.set_libav_level(av.logging.FATAL)
    try:
        found = path.is_file()
    except OSError as error:  # too long a name; it says nothing about the machine, so it must not end the stage
        raise VideoError(Status.MISSING_FILE, f"cannot be looked up: {error.strerror}") from None
    if not found:
        raise VideoError(Status.MISSING_FILE, "no such file")
    if path.stat().st_size == 0:
        raise VideoError(Status.EMPTY_FILE, "the file has no bytes")
    try:
        # `file:` keeps a colon in a name from being read as a protocol.
        return av.open(f"file:{path}", **open_arguments(path))
    except (av.error.FFmpegError, OSError, UnicodeError) as error:
        raise VideoError(Status.OPEN_FAILED, f"no container that ffmpeg can read ({plain_error(error)})") from None


def choose_stream(container: Any) -> Any:
    """The first video stream that is not a cover picture."""
    for stream in container.streams.video:
        if av.stream.Disposition.attached_pic not in stream.disposition and stream.codec_context is not None:
            return stream
    raise VideoError(Status.NO_VIDEO_STREAM, f"{len(container.streams)} streams, none of them video")


def hidden_frames(stream: Any) -> int:
    """Coded frames that the container's edit list hides from the player."""
    return sum(entry.is_discard for entry in stream.index_entries)


def stated_seconds(stream: Any) -> float | None:
    """The video stream's own duration where its container says one; the file's may be that of the sound."""
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    stated = stream.metadata.get("DURATION", "")  # Matroska: 00:00:04.000000000
    try:
        hours, minutes, seconds = stated.split(":")
        return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    except ValueError:
        return None


def plain_error(error: BaseException) -> str:
    """An error without the file's path, which differs between machines."""
    return str(getattr(error, "strerror", None) or type(error).__name__)
