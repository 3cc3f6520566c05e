"""The frames stage: every k-th decoded frame of a shard's clips as JPEGs in one tar, and a table of where they lie."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from stm.config import BadInput, Frames
from stm.jobs.journal import Journal
from stm.jobs.status import Status
from stm.manifest import check_failures, read_rows
from stm.preprocess.clip_outcomes import Note, name_item, pack_record, run_shard
from stm.preprocess.frames.table import read_frames, read_jpegs, read_kept, write_frames
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
    """Makes `tar` and `index` of one shard; their bytes do not depend on `processes`.

    Args:
        slice_path: the shard's clips (MANIFEST_SCHEMA, sorted by key).
        root: the dataset's folder; no clip's path may leave it.
        tar: `{key}.json`, `{key}.0000.jpg`, ... of the clips that are kept, sorted by key.
        index: one row a clip of the slice, kept or not; see `frames_table.FRAMES_SCHEMA`.
        processes: clips decoded at a time.

    Raises:
        TooManyFailures: more clips were dropped than `bad_input` allows. Both files are written by then, and the
            finished clips are remembered: a second attempt after a change of policy decodes nothing again.
        OSError: the disk is full, or a folder cannot be written.
    """
    rows = read_rows(slice_path)
    # The deadline changes no byte of a clip that is done in time.
    receipt = make_receipt("frames", settings.fingerprint(), _LIBRARIES)
    journal = Journal(tar, receipt)
    tasks = [FrameTask(row, root, settings, journal) for row in rows]
    title = f"frames {slice_path.stem}"
    failures = run_shard(title, extract_clip, tasks, journal, processes, settings.timeout_seconds)
    outcomes = write_frames(rows, journal, failures, tar, index, receipt, bad_input)
    check_failures("frames", outcomes, bad_input.max_failure_rate)
    journal.close()


@dataclass(frozen=True)
class FrameTask:
    """One clip for a worker process."""

    row: Mapping[str, Any]
    root: Path
    settings: Frames
    journal: Journal

    @property
    def item(self) -> str:
        return name_item(self.row)


def extract_clip(task: FrameTask) -> None:
    """Decodes one clip, in a worker process, and leaves its JPEGs and times in the journal."""
    row, settings = task.row, task.settings
    header: dict[str, Any] = {"pts": [], "decode_index": []}
    jpegs: list[bytes] = []
    try:
        path = safe_join(task.root, row["path"])
        with Video(path, row["start"], row["end"], max_side=settings.max_side) as video:
            _read_clip(video, settings, header, jpegs)
            notes = video.notes
        if len(jpegs) < settings.min_frames:
            notes.insert(0, _too_short(video, settings, len(jpegs)))
    except UnsafePathError:
        notes = [Note(Status.PATH_OUTSIDE_ROOT, f"{row['path']!r} leaves the dataset's folder")]
    except VideoError as error:
        notes = [Note(error.status, error.detail)]
    task.journal.put(task.item, pack_record(header, notes, jpegs))


def _read_clip(video: Video, settings: Frames, header: dict[str, Any], jpegs: list[bytes]) -> None:
    """Fills in the header (sizes, times) and one JPEG for each stored frame."""
    resize = Resizer()
    for frame in video.frames():
        if frame.index == 0:
            shown = video.orientation.size(frame.picture.width, frame.picture.height)
            header["source_width"], header["source_height"] = shown
            header["width"], header["height"] = _checked_size(*shown, settings)
        # A picture that the decoder marks as damaged is counted and left out: the index shows the gap.
        if frame.index % settings.every or frame.corrupt:
            continue
        if len(jpegs) == settings.max_frames:
            return
        size = video.orientation.size(header["width"], header["height"])
        picture = video.orientation.turn(resize(frame.picture, *size))
        jpegs.append(encode_jpeg(picture, settings.quality))
        header["pts"].append(frame.seconds)
        header["decode_index"].append(frame.index)


def _checked_size(width: int, height: int, settings: Frames) -> tuple[int, int]:
    """The stored size of a video of this shown size, or the reason why it is refused."""
    if min(width, height) < settings.min_side:
        raise VideoError(Status.TOO_SMALL, f"{width} x {height} pixels; a side is shorter than {settings.min_side}")
    size = stored_size(width, height, settings.short_side)
    if max(size) > settings.max_side:
        raise VideoError(Status.OPEN_FAILED, f"stored frames would be {size[0]} x {size[1]} pixels")
    return size


def _too_short(video: Video, settings: Frames, stored: int) -> Note:
    part = "" if video.start is None and video.end is None else f" from {video.start} to {video.end} s"
    have = f"{stored} frames to store of {video.decoded} decoded{part}"
    return Note(Status.TOO_SHORT, f"{have}; {settings.min_frames} are needed")


def stored_size(width: int, height: int, short_side: int) -> tuple[int, int]:
    """Width and height of the stored frame: the short side exactly, the long side to the nearest even number."""
    short, long = sorted((width, height))
    along = max(short_side, 2 * ((long * short_side + short) // (2 * short)))
    return (along, short_side) if width >= height else (short_side, along)


def encode_jpeg(picture: NDArray[np.uint8], quality: int) -> bytes:
    """An RGB picture, uint8 [height, width, 3], as a JPEG with halved chroma, as nearly all video has it."""
    data: bytes = simplejpeg.encode_jpeg(np.ascontiguousarray(picture), quality, colorsubsampling="420")
    return data
