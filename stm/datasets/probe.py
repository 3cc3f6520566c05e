"""Reads the metadata of a video file from its container and first frame: displayed size, frame rate, codec, hash."""

from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import av

from stm.datasets.display import PixelAspect, choose_stream, describe_size, read_cropping, shown_size
from stm.datasets.folder import IMAGE_ENDINGS
from stm.datasets.media import is_from_machine, open_media
from stm.jobs.status import Status
from stm.manifest import hash_ends
from stm.storage.files import sha256_file

# Only these demuxers are allowed. Others accept any text as subtitles or ANSI art, or open other files and URLs (the
# playlists hls, dash and concat).
CONTAINERS = (
    # video
    "mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "avi", "mpegts", "mpeg", "mpegvideo", "m4v", "h264", "hevc", "vvc",
    "obu", "av1", "ivf", "flv", "live_flv", "kux", "asf", "ogg", "gif", "apng", "nut", "mxf", "gxf", "rm", "wtv", "dv",
    "vc1", "h261", "h263", "mjpeg", "yuv4mpegpipe", "cavsvideo", "amv", "nsv",
    # audio, so that the error can report that the video stream is missing
    "mp3", "wav", "w64", "flac", "aac", "aiff", "ac3", "eac3", "caf",
)  # fmt: skip
# Used whenever a video file is opened, here and in the offline stages.
OPEN_OPTIONS = {"format_whitelist": ",".join(CONTAINERS), "protocol_whitelist": "file"}

# Images are single-frame clips. Their demuxer is set explicitly, because ffmpeg's default, `image2`, also reads
# sequences of numbered files. It is selected by the first bytes, because crawled images often have the extension of a
# different format.
_IMAGES = ((0, b"\xff\xd8\xff", "jpeg_pipe"), (0, b"\x89PNG\r\n\x1a\n", "png_pipe"), (8, b"WEBP", "webp_pipe"))
_IMAGE_FORMATS = {name for _, _, name in _IMAGES}
# Decoders of video streams: apply a crop in the codec's header exactly, even if the pixels are then not aligned in memory.
DECODER_OPTIONS = {"flags": "+unaligned"}
_MAX_PNG_CHUNKS = 1000  # before the pixels; real files have at most a few dozen

Facts = dict[str, Any]


def probe_file(path: Path, min_side: int, max_side: int) -> Facts:
    """Probes one file in this process.

    Args:
        min_side: pixels; a file with a shorter side is `too_small`.
        max_side: pixels; a file with a longer side is `open_failed`.

    Returns:
        status, detail and, if known, fps, width, height, codec, frames, duration, bytes, sha256, ends_hash.

    Raises:
        OSError: the machine cannot read the file, for instance because its disk fails; this says nothing about the file.
    """
    facts: Facts = {"status": Status.OK, "detail": ""}
    try:
        facts["bytes"] = path.stat().st_size
        if not path.is_file():
            return facts | {"status": Status.OPEN_FAILED, "detail": "not a regular file"}
        if not facts["bytes"]:
            return facts | {"status": Status.EMPTY_FILE, "detail": "the file has no bytes"}
        facts["sha256"] = sha256_file(path)
        facts["ends_hash"] = hash_ends(path)
        facts |= _probe_container(path, max_side)
    except FileNotFoundError:
        return facts | {"status": Status.MISSING_FILE, "detail": "there is no such file"}
    except (av.FFmpegError, OSError, ValueError) as error:
        if is_from_machine(error):
            raise
        return facts | {"status": Status.OPEN_FAILED, "detail": f"cannot be opened as a video: {_first_words(error)}"}
    if facts["status"] is not Status.OK:
        return facts
    shape = facts["detail"]
    return _check_size(facts | {"detail": ""}, min_side, max_side, shape)


def open_arguments(path: Path) -> dict[str, Any]:
    """Arguments with which `av.open` opens a file as an image or as one of CONTAINERS; an animated PNG is a video.

    Raises:
        AnimatedImageError: the file is an animated WebP image.
        OSError: the file cannot be read.
    """
    if path.suffix.lower() in IMAGE_ENDINGS:
        with path.open("rb") as file:
            start = file.read(32)
            if start[8:16] == b"WEBPVP8X" and start[20] & 2:  # the flag of an animation
                raise AnimatedImageError("an animated WebP image, which cannot be decoded; convert it to a video")
            animated = start.startswith(b"\x89PNG") and _is_animated_png(file)
        for offset, mark, name in _IMAGES:
            if start[offset:].startswith(mark) and not animated:
                return {"format": name, "options": {**OPEN_OPTIONS, "format_whitelist": name}}
    return {"options": OPEN_OPTIONS}


class AnimatedImageError(ValueError):
    """An image file that contains a video, of a format that cannot be decoded."""


def _is_animated_png(file: BinaryIO) -> bool:
    """Whether a PNG file has an animation: the chunk `acTL` before the first pixels."""
    place = 8
    for _ in range(_MAX_PNG_CHUNKS):
        file.seek(place)
        head = file.read(8)
        if head[4:] == b"acTL":
            return True
        if len(head) < 8 or head[4:] == b"IDAT":
            return False
        place += 12 + int.from_bytes(head[:4], "big")  # length, name, content, checksum
    return False


def is_image(container: Any) -> bool:
    """Whether an open file is a single image."""
    return container.format.name in _IMAGE_FORMATS


def _first_words(error: Exception) -> str:
    """An error's text without the path, so that quarantine tables do not depend on the location of the dataset."""
    if isinstance(error, AnimatedImageError):
        return str(error)
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return f"{type(error).__name__}: {text.splitlines()[0]:.200}"


def _probe_container(path: Path, max_side: int) -> Facts:
    # PyAV's log hook can deadlock in workers. ffmpeg's own logger writes to stderr, so it is limited to PANIC.
    av.logging.restore_default_callback()
    av.logging.set_libav_level(av.logging.PANIC)
    with open_media(path, **open_arguments(path)) as container:
        stream = choose_stream(container)
        if stream is None:
            return _without_stream(container)
        # A small file can contain an enormous frame, whose size is known only after decoding.
        stream.codec_context.options = {"max_pixels": str(max_side**2), **DECODER_OPTIONS}
        shown = {**_displayed_size(container, stream), "codec": stream.codec_context.name}
        if is_image(container):  # ffmpeg reports an arbitrary frame rate for images
            return {"fps": None, **shown, "frames": 1, "duration": None}
        return {
            "fps": _positive(stream.average_rate or stream.guessed_rate),
            **shown,
            "frames": stream.frames or None,
            "duration": _duration(container, stream),
        }


def _without_stream(container: Any) -> Facts:
    videos = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
    if videos:
        return {"status": Status.OPEN_FAILED, "detail": "its codec is unknown to ffmpeg"}
    kinds = {s.type for s in container.streams}
    if not kinds & {"audio", "video"}:
        return {"status": Status.OPEN_FAILED, "detail": "neither video nor audio: is the header cut off?"}
    detail = f"no video stream; the streams are: {', '.join(sorted(kinds))}"
    return {"status": Status.NO_VIDEO_STREAM, "detail": detail}


def _displayed_size(container: Any, stream: Any) -> Facts:
    """Width and height of the first frame as a player shows it; from the header if no frame can be decoded."""
    cropping, aspect = read_cropping(container, stream), PixelAspect(stream)
    context = stream.codec_context
    context.thread_count = 1
    width, height, rotation = context.width, context.height, 0
    with suppress(av.FFmpegError, StopIteration):
        frame = next(container.decode(stream))
        width, height, rotation = frame.width, frame.height, frame.rotation
    width, height = cropping.size(width, height)
    shape = Fraction(1) if is_image(container) else aspect.now()
    size = shown_size(width, height, shape)
    detail = "" if shape == 1 else f" ({describe_size(width, height, shape)})"
    width, height = size[::-1] if rotation % 180 == 90 else size
    return {"width": width, "height": height, "detail": detail}


def _positive(value: Any) -> float | None:
    return float(value) if value else None


def _duration(container: Any, stream: Any) -> float | None:
    """The duration in seconds, as reported by the container."""
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    return container.duration / av.time_base if container.duration else None


def _check_size(facts: Facts, min_side: int, max_side: int, shape: str) -> Facts:
    width, height = facts["width"], facts["height"]
    shown = f"{width} x {height} pixels{shape}"
    if min(width, height) <= 0:
        return facts | {"status": Status.OPEN_FAILED, "detail": "no frame size: damaged, or far too large"}
    if max(width, height) > max_side:
        return facts | {"status": Status.OPEN_FAILED, "detail": f"{shown}; frames.max_side is {max_side}"}
    if min(width, height) < min_side:
        return facts | {"status": Status.TOO_SMALL, "detail": f"{shown}; frames.min_side is {min_side}"}
    return facts
