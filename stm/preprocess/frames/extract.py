"""The frames stage: store frames of a shard's clips as JPEGs in one tar, with an offset index.

Which frames: every k-th decoded one, or a number of them spread over the clip.
"""

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
from stm.preprocess.frames.lenders import borrow_frames
from stm.preprocess.frames.spread import choose_candidates, spread_frames
from stm.preprocess.frames.stage import Lender
from stm.preprocess.frames.table import read_frames, read_jpegs, read_kept, write_frames
from stm.preprocess.sub_clips import read_sequence, run_sequences
from stm.preprocess.video.container import VideoError
from stm.preprocess.video.reader import DecodedFrame, Video
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
    lenders: Sequence[Lender] = (),
) -> None:
    """Write `tar` and `index` of one shard; their bytes do not depend on `processes`, nor on `lenders`.

    Args:
        slice_path: the shard's clips (MANIFEST_SCHEMA, sorted by key).
        root: the dataset's folder; a clip's path must stay inside it.
        tar: output with `{key}.json`, `{key}.0000.jpg`, ... per kept clip, sorted by key.
        index: output with one row per clip of the slice, kept or not; see `table.FRAMES_SCHEMA`.
        processes: number of clips decoded in parallel.
        lenders: shards of another dataset with the same folder and settings: the clips that they have are not decoded.

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
    unfinished = borrow_frames(title, unfinished, lenders, journal)
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
    try:
        path = safe_join(task.root, task.row["path"])
        check_unchanged(path, task.row)
        record = _extract(path, task)
    except UnsafePathError:
        detail = f"{task.row['path']!r} leaves the dataset's folder"
        record = _without_frames(Note(Status.PATH_OUTSIDE_ROOT, detail))
    except VideoError as error:
        record = _without_frames(Note(error.status, error.detail))
    task.journal.put(task.item, record)


def _extract(path: Path, task: FrameTask) -> bytes:
    """Read the clip, and again if it has another number of frames than its manifest says and other frames are stored."""
    row, settings = task.row, task.settings
    decoded: int | None = None
    while True:
        with Video(path, row["start"], row["end"], max_side=settings.max_side) as video:
            clip = StoredClip(settings, choose_candidates(settings, row, decoded))
            record = _decode_clip(video, clip)
        if record is not None:
            return record
        decoded = clip.decoded


def extract_sequence(tasks: Sequence[FrameTask]) -> None:
    """Decode clips of one file in one pass, if seeking is not exact, with the same records as `extract_clip`."""
    settings = tasks[0].settings
    for task, video in read_sequence(tasks, settings.timeout_seconds, max_side=settings.max_side):
        record = _decode_clip(video, StoredClip(settings, choose_candidates(settings, task.row)))
        if record is not None:  # otherwise it is read alone
            task.journal.put(task.item, record)


def _without_frames(note: Note) -> bytes:
    return pack_record({"pts": [], "decode_index": []}, [note])


class StoredClip:
    """The frames of a clip that are stored, while it is being read.

    Args:
        candidates: the decode indices that may be stored; None: every k-th.

    Attributes:
        header: sizes (pixels) and timestamps (s) for the journal.
        jpegs: one JPEG per stored frame.
        decoded: number of frames of the clip that were read.
    """

    def __init__(self, settings: Frames, candidates: frozenset[int] | None) -> None:
        self.settings = settings
        self.header: dict[str, Any] = {"pts": [], "decode_index": []}
        self.jpegs: list[bytes] = []
        self.decoded = 0
        self._candidates = candidates
        self._resize = Resizer()

    @property
    def full(self) -> bool:
        """Whether no further frame is stored."""
        return self._candidates is None and len(self.jpegs) == self.settings.max_frames

    def takes(self, index: int) -> bool:
        """Whether the frame with this decode index may be stored."""
        if self._candidates is not None:
            return index in self._candidates
        return index % (self.settings.every or 1) == 0

    def add(self, frame: DecodedFrame, video: Video) -> None:
        """Store a frame."""
        # Resize before rotating: swscale works on the coded orientation, and the smaller frame is cheaper to rotate.
        size = video.orientation.size(self.header["width"], self.header["height"])
        image = video.orientation.turn(self._resize(frame.image, *size))
        self.jpegs.append(encode_jpeg(image, self.settings.quality))
        self.header["pts"].append(frame.seconds)
        self.header["decode_index"].append(frame.index)

    def finish(self) -> bool:
        """Keep only the frames that are spread over the clip, whose length is known now.

        Returns:
            False if some of them were not among the candidates, so that the clip has to be read again.
        """
        if self.settings.count is None or self._candidates is None:
            return True
        chosen = set(spread_frames(self.decoded, self.settings.count))
        if not chosen <= self._candidates:
            return False
        kept = [place for place, index in enumerate(self.header["decode_index"]) if index in chosen]
        self.jpegs = [self.jpegs[place] for place in kept]
        for name in ("pts", "decode_index"):
            self.header[name] = [self.header[name][place] for place in kept]
        return True


def _decode_clip(video: Video, clip: StoredClip) -> bytes | None:
    """Return the record of an open clip for the journal; None if it has to be read again, see `StoredClip.finish`."""
    failure = changed = None
    try:
        changed = _read_clip(video, clip)
    except VideoError as error:
        failure = Note(error.status, error.detail)
    if not clip.finish():
        return None
    if failure is not None:
        return pack_record(clip.header, [failure], clip.jpegs)
    notes = video.notes
    # Inserted first, because the first note decides the status among equal policies; a change of size is why a clip is
    # too short.
    if len(clip.jpegs) < clip.settings.min_frames:
        notes.insert(0, _too_short(video, clip.settings, len(clip.jpegs)))
    if changed is not None:
        notes.insert(0, changed)
    return pack_record(clip.header, notes, clip.jpegs)


def _read_clip(video: Video, clip: StoredClip) -> Note | None:
    """Read the frames of a clip and store those that it takes.

    Returns:
        a note if reading ended because the shape of the frames changes within the clip.
    """
    header, settings = clip.header, clip.settings
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
        clip.decoded = frame.index + 1
        # A frame that the decoder marks as damaged still counts, so that all later frames keep their index and time; it
        # is not stored, and `decode_index` shows the gap.
        if not clip.takes(frame.index) or frame.corrupt:
            continue
        if clip.full:
            return None
        clip.add(frame, video)
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
