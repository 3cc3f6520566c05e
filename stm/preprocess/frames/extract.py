"""The frames stage: store every k-th decoded frame of a shard's clips as a JPEG in one tar, with an offset index."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import simplejpeg
from numpy.typing import NDArray

from stm.config import BadInput, Frames
from stm.jobs.journal import Journal
from stm.jobs.status import Status
from stm.manifest import check_failures, check_unchanged, read_slice
from stm.preprocess.clip_outcomes import Note, name_item, pack_record, run_shard
from stm.preprocess.frames.table import read_frames, read_jpegs, read_kept, write_frames
from stm.preprocess.sub_clips import read_sequence, run_sequences
from stm.preprocess.video.container import VideoError
from stm.preprocess.video.reader import Video
from stm.preprocess.video.resize import Resizer
from stm.storage.files import UnsafePathError, safe_join
from stm.storage.receipts import make_receipt

__all__ = ["encode_jpeg", "extract_frames", "read_frames", "read_jpegs", "read_kept", "stored_size"]

_LIBRARIES = ("av", "simplejpeg", "numpy")


def extract_frames(
    slice_path: Path,
    root: Path,
    tar: Path,
    index: Path,
    settings: Frames,
    bad_input: BadInput,
    processes: int,
) -> None:
    """Write `tar` and `index` of one shard; their bytes do not depend on `processes`.

    Args:
        slice_path: the shard's clips (MANIFEST_SCHEMA, sorted by key).
        root: the dataset's folder; a clip's path must stay inside it.
        tar: output with `{key}.json`, `{key}.0000.jpg`, ... per kept clip, sorted by key.
        index: output with one row per clip of the slice, kept or not; see `table.FRAMES_SCHEMA`.
        processes: number of clips decoded in parallel.

    Raises:
        TooManyFailures: more clips were dropped than `bad_input` allows. Both files have been written, and the journal
            keeps the finished clips, so that a retry with a different policy does not decode them again.
        OSError: the disk is full, or a folder is not writable.
    """
    rows = read_slice(slice_path)
    # The fingerprint omits the deadline, which does not affect clips that finish in time.
    receipt = make_receipt("frames", settings.fingerprint(), _LIBRARIES)
    journal = Journal(tar, receipt)
    tasks = [FrameTask(row, root, settings, journal) for row in rows]
    title = f"frames {slice_path.stem}"
    unfinished = [task for task in tasks if journal.get(task.item) is None]
    run_sequences(title, extract_sequence, unfinished, processes, settings.timeout_seconds)
    failures = run_shard(title, extract_clip, tasks, journal, processes, settings.timeout_seconds)
    # The journal's receipt omits the policy, so that a retry with a different policy does not decode the clips again.
    policy = {"policy": bad_input.model_dump(mode="json")["policy"]}
    outcomes = write_frames(rows, journal, failures, tar, index, receipt | policy, bad_input)
    check_failures("frames", outcomes, bad_input.max_failure_rate)
    journal.close()


@dataclass(frozen=True)
class FrameTask:
    """One clip to be decoded by a worker process."""

    row: Mapping[str, Any]
    root: Path
    settings: Frames
    journal: Journal

    @property
    def name(self) -> str:
        """The clip's name in error messages."""
        return str(self.row["video_id"])

    @property
    def item(self) -> str:
        """The clip's identifier in the journal."""
        return name_item(self.row)


def extract_clip(task: FrameTask) -> None:
    """Decode one clip in a worker process, and write its JPEGs and timestamps to the journal."""
    row, settings = task.row, task.settings
    try:
        path = safe_join(task.root, row["path"])
        check_unchanged(path, row)
        with Video(path, row["start"], row["end"], max_side=settings.max_side) as video:
            record = _decode_clip(video, settings)
    except UnsafePathError:
        record = _without_frames(Note(Status.PATH_OUTSIDE_ROOT, f"{row['path']!r} leaves the dataset's folder"))
    except VideoError as error:
        record = _without_frames(Note(error.status, error.detail))
    task.journal.put(task.item, record)


def extract_sequence(tasks: Sequence[FrameTask]) -> None:
    """Decode clips of one file in one pass, if seeking is not exact, with the same records as `extract_clip`."""
    settings = tasks[0].settings
    for task, video in read_sequence(tasks, settings.timeout_seconds, max_side=settings.max_side):
        task.journal.put(task.item, _decode_clip(video, settings))


def _without_frames(note: Note) -> bytes:
    return pack_record({"pts": [], "decode_index": []}, [note])


def _decode_clip(video: Video, settings: Frames) -> bytes:
    """Return the record of an open clip for the journal."""
    header: dict[str, Any] = {"pts": [], "decode_index": []}
    jpegs: list[bytes] = []
    try:
        changed = _read_clip(video, settings, header, jpegs)
    except VideoError as error:
        return pack_record(header, [Note(error.status, error.detail)], jpegs)
    notes = video.notes
    # Inserted first, because the first note decides the status among equal policies; a change of size is why a clip is
    # too short.
    if len(jpegs) < settings.min_frames:
        notes.insert(0, _too_short(video, settings, len(jpegs)))
    if changed is not None:
        notes.insert(0, changed)
    return pack_record(header, notes, jpegs)


def _read_clip(video: Video, settings: Frames, header: dict[str, Any], jpegs: list[bytes]) -> Note | None:
    """Fill `header` with sizes (pixels) and timestamps (s), and `jpegs` with one JPEG per stored frame.

    Returns:
        a note if reading ended because the shape of the frames changes within the clip.
    """
    resize = Resizer()
    shape = ""
    for frame in video.frames():
        if frame.index == 0:
            shape = video.describe_size(frame.image)
            header["source_width"], header["source_height"] = video.shown_size(frame.image)
            header["width"], header["height"] = _checked_size(video, frame.image, settings)
        # A size that changes while the shape of the frame does not, as in adaptive streams, makes no difference.
        elif (now := video.describe_size(frame.image)) != shape:
            size = stored_size(*video.shown_size(frame.image), settings.short_side)
            if size != (header["width"], header["height"]):
                return Note(
                    Status.SIZE_CHANGES, f"the frame size changes at {frame.seconds:.3f} s from {shape} to {now}"
                )
            shape = now
        # A frame that the decoder marks as damaged still counts, so that all later frames keep their index and time; it
        # is not stored, and `decode_index` shows the gap.
        if frame.index % settings.every or frame.corrupt:
            continue
        if len(jpegs) == settings.max_frames:
            return None
        # Resize before rotating: swscale works on the coded orientation, and the smaller frame is cheaper to rotate.
        size = video.orientation.size(header["width"], header["height"])
        image = video.orientation.turn(resize(frame.image, *size))
        jpegs.append(encode_jpeg(image, settings.quality))
        header["pts"].append(frame.seconds)
        header["decode_index"].append(frame.index)
    return None


def _checked_size(video: Video, image: av.VideoFrame, settings: Frames) -> tuple[int, int]:
    """Return the stored width and height, in pixels, of the clip that begins with this frame.

    Raises:
        VideoError: the video is too small or its stored frames would be too large.
    """
    width, height = video.shown_size(image)
    coded = "" if video.pixel_aspect == 1 else f" ({video.describe_size(image)})"
    if min(width, height) < settings.min_side:
        reason = f"{width} x {height} pixels{coded}; a side is shorter than {settings.min_side}"
        raise VideoError(Status.TOO_SMALL, reason)
    size = stored_size(width, height, settings.short_side)
    if max(size) > settings.max_side:
        raise VideoError(Status.OPEN_FAILED, f"stored frames would be {size[0]} x {size[1]} pixels{coded}")
    return size


def _too_short(video: Video, settings: Frames, stored: int) -> Note:
    interval = "" if video.start is None else f" from {video.start}"
    interval += "" if video.end is None else f" to {video.end}"
    interval += " s" if interval else ""
    counts = f"{stored} frames to store of {video.decoded} decoded{interval}"
    return Note(Status.TOO_SHORT, f"{counts}; {settings.min_frames} are needed")


def stored_size(width: int, height: int, short_side: int) -> tuple[int, int]:
    """Return the stored width and height in pixels: the short side exact, the long side rounded to an even number."""
    short, long = sorted((width, height))
    along = max(short_side, 2 * ((long * short_side + short) // (2 * short)))
    return (along, short_side) if width >= height else (short_side, along)


def encode_jpeg(image: NDArray[np.uint8], quality: int) -> bytes:
    """Encode an RGB image, uint8 [height, width, 3], as a JPEG; `quality` is 1 to 100."""
    # 4:2:0 chroma subsampling: nearly all video is coded this way, so finer chroma would only enlarge the file.
    data: bytes = simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality, colorsubsampling="420")
    return data
