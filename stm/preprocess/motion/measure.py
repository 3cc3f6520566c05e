"""The motion stage: magnitude and direction of each cell's motion between stored frames.

Three backends write the same format (see `Motion.backend`): `codec` reads the motion vectors of the stream, `transcode`
reads those of a transcode created for this purpose, and `mestimate` uses ffmpeg's block matching on decoded frames. All
of them use the decoder of the frames stage with the same clip bounds, so that frames and motion are aligned.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stm.config import BadInput, Motion
from stm.jobs.journal import Journal
from stm.jobs.status import Status
from stm.manifest import check_failures, check_unchanged
from stm.preprocess.clip_outcomes import (
    Note,
    Outcome,
    Record,
    VideoOutcome,
    as_columns,
    finished_rows,
    name_item,
    pack_record,
    run_shard,
)
from stm.preprocess.frames.table import read_kept, rows_of_kept
from stm.preprocess.motion.accumulate import MotionSum
from stm.preprocess.motion.block_matching import estimate_fields
from stm.preprocess.motion.codec import EXPORTING_CODECS, Field, read_fields
from stm.preprocess.motion.transcode import transcode_fields
from stm.preprocess.sub_clips import read_sequence, run_sequences
from stm.preprocess.video.container import VideoError
from stm.preprocess.video.reader import DecodedFrame, Video
from stm.shards.grid import map_shape
from stm.storage.files import UnsafePathError, safe_join
from stm.storage.receipts import make_receipt
from stm.storage.tables import write_rows

MOTION_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("video_id", pa.string(), nullable=False),
        pa.field("frames", pa.int32(), nullable=False),  # T, stored frames
        pa.field("rows", pa.int32(), nullable=False),
        pa.field("columns", pa.int32(), nullable=False),
        pa.field("magnitude", pa.list_(pa.float16())),  # [T, rows, columns], cells per step between stored frames
        pa.field("vector", pa.list_(pa.float16())),  # [T, rows, columns, 2], x right, y down, of the content
        pa.field("intra", pa.list_(pa.uint8())),  # [T, rows, columns], 0 to 255: interpolated fraction
        pa.field("status", pa.string(), nullable=False),
        pa.field("policy", pa.string(), nullable=False),
        pa.field("detail", pa.string(), nullable=False),
    ]
)
_ROW_GROUP = 16  # clips per row group; small, because readers load a whole group into memory
_LIBRARIES = ("av", "numpy")


def extract_motion(
    slice_path: Path,
    root: Path,
    frames_index: Path,
    output: Path,
    settings: Motion,
    grid: int,
    bad_input: BadInput,
    processes: int,
) -> None:
    """Write the motion of one shard: one row per clip that the frames stage kept; see `MOTION_SCHEMA`.

    Args:
        slice_path: the shard's clips (MANIFEST_SCHEMA, sorted by key).
        root: the dataset's folder.
        frames_index: index of the frames stage, with the kept clips, their stored frames and their size.
        grid: cells along the short side of the maps.
        processes: number of clips processed in parallel; it does not affect the output.

    Raises:
        TooManyFailures: more clips lack motion than `bad_input` allows; raised after `output` is written.
        ValueError: the frames index is missing or truncated, or the backend `transcode` has no encoder.
    """
    if settings.backend == "transcode" and "libx264" not in av.codecs_available:
        raise ValueError(
            "motion.backend `transcode` needs PyAV with libx264, which its wheels include; install one or set "
            "another backend"
        )
    kept = read_kept(frames_index)
    rows = rows_of_kept(slice_path, kept)
    receipt = make_receipt("motion", settings.fingerprint(), _LIBRARIES, grid=grid)
    journal = Journal(output, receipt)
    tasks = [MotionTask(*pair, root, settings, grid, journal) for pair in zip(rows, kept, strict=True)]
    title = f"motion {slice_path.stem}"
    unfinished = [task for task in tasks if journal.get(task.item) is None]
    run_sequences(title, extract_sequence, unfinished, processes, settings.timeout_seconds)
    failures = run_shard(title, extract_clip, tasks, journal, processes, settings.timeout_seconds)
    outcomes: list[VideoOutcome] = []
    table = finished_rows(tasks, journal, failures, bad_input, _make_row, outcomes)
    policy = {"policy": bad_input.model_dump(mode="json")["policy"]}  # affects only statuses, not the journal's items
    write_rows(output, MOTION_SCHEMA, table, receipt | policy, _ROW_GROUP)
    check_failures("motion", outcomes, bad_input.max_failure_rate)
    journal.close()


@dataclass(frozen=True)
class MotionTask:
    """One clip whose motion is to be measured by a worker process."""

    row: Mapping[str, Any]  # the clip's row of the slice
    frames: Mapping[str, Any]  # the clip's row of the frames index
    root: Path
    settings: Motion
    grid: int
    journal: Journal

    @property
    def name(self) -> str:
        """The clip's name in error messages."""
        return str(self.row["video_id"])

    @property
    def item(self) -> str:
        """The clip's identifier in the journal; it changes with the video and the choice of stored frames."""
        return json.dumps([name_item(self.row), *(self.frames[n] for n in ("width", "height", "decode_index"))])

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the map, in cells."""
        return map_shape(self.frames["width"], self.frames["height"], self.grid)


def extract_clip(task: MotionTask) -> None:
    """Measure one clip in a worker process, and write its maps to the journal."""
    row = task.row
    try:
        path = safe_join(task.root, row["path"])
        check_unchanged(path, row)
        with Video(path, row["start"], row["end"], vectors=task.settings.backend == "codec") as video:
            record = _measure_task(video, task)
    except UnsafePathError:
        record = pack_record({}, [Note(Status.PATH_OUTSIDE_ROOT, f"{row['path']!r} leaves the dataset's folder")])
    except VideoError as error:
        record = pack_record({}, [Note(error.status, error.detail)])
    task.journal.put(task.item, record)


def extract_sequence(tasks: Sequence[MotionTask]) -> None:
    """Measure clips of one file in one pass, if seeking is not exact, with the same records as `extract_clip`."""
    settings = tasks[0].settings
    vectors = settings.backend == "codec"
    for task, video in read_sequence(tasks, settings.timeout_seconds, vectors=vectors):
        task.journal.put(task.item, _measure_task(video, task))


def _measure_task(video: Video, task: MotionTask) -> bytes:
    """Return the record of an open clip for the journal."""
    try:
        motion = measure_clip(video, np.array(task.frames["decode_index"]), task.shape, task.settings)
    except VideoError as error:
        return pack_record({}, [Note(error.status, error.detail)])
    return pack_record({}, [], [part.tobytes() for part in motion])


def _make_row(task: MotionTask, record: Record, outcome: Outcome) -> dict[str, Any]:
    dtypes = {"magnitude": np.float16, "vector": np.float16, "intra": np.uint8}
    maps: list[NDArray[Any] | None] = [None] * 3
    if record.blobs:
        maps = [np.frombuffer(blob, dtype) for blob, dtype in zip(record.blobs, dtypes.values(), strict=True)]
    rows, columns = task.shape
    return {
        "key": task.row["key"],
        "video_id": task.row["video_id"],
        "frames": task.frames["frames"],
        "rows": rows,
        "columns": columns,
        **dict(zip(dtypes, maps, strict=True)),
        **as_columns(outcome),
    }


class MotionMaps(NamedTuple):
    """The motion of one clip with T stored frames. Frame 0 has no previous frame, so it repeats frame 1."""

    magnitude: NDArray[np.float16]  # [T, rows, columns] cells per step
    vector: NDArray[np.float16]  # [T, rows, columns, 2] cells per step
    intra: NDArray[np.uint8]  # [T, rows, columns] 0 to 255: interpolated fraction


def measure_motion(
    path: Path,
    start: float | None,
    end: float | None,
    decode_index: NDArray[np.integer],
    shape: tuple[int, int],
    settings: Motion,
) -> MotionMaps:
    """Measure the motion of one clip between its stored frames.

    Args:
        path: the video.
        start, end: bounds of the clip in seconds, the same as in the frames stage.
        decode_index: decode indices of the stored frames, ascending.
        shape: rows and columns of the map over the frame as displayed, in cells.

    Raises:
        VideoError: the file cannot be read, has no motion vectors, or has fewer frames than when they were stored.
    """
    with Video(path, start, end, vectors=settings.backend == "codec") as video:
        return measure_clip(video, decode_index, shape, settings)


def measure_clip(
    video: Video, decode_index: NDArray[np.integer], shape: tuple[int, int], settings: Motion
) -> MotionMaps:
    """Measure the motion of an open clip, with `vectors` for the backend `codec`; otherwise as `measure_motion`."""
    total = MotionSum(decode_index, *shape)
    for field in _read_backend(video, shape, settings.backend):
        if field.index < 0:  # outside the clip
            continue
        total.add(_remove_camera(field) if settings.subtract_camera else field)
        if total.complete:  # frames after the last stored one are not needed
            break
    _check_complete(total, video, decode_index)
    maps = MotionMaps(total.magnitude.astype(np.float16), total.vector.astype(np.float16), total.intra)
    # The first frame has no previous frame; zero motion would make its content look static to motion-guided masking.
    for part in maps:
        part[0] = part[min(1, len(part) - 1)]
    return maps


def _read_backend(video: Video, shape: tuple[int, int], backend: str) -> Iterator[Field]:
    """Yield fields in the video's display orientation."""
    if backend == "codec" and video.codec not in EXPORTING_CODECS:
        reason = f"{video.codec} exports no motion vectors; set motion.backend to `mestimate` or `transcode`"
        raise VideoError(Status.UNSUPPORTED_MOTION, reason)
    frames = video.frames(surroundings=backend == "codec")
    # The orientation is known only after the first frame.
    first = next(frames, None)
    if first is None:
        return
    rows, columns = video.orientation.size(*shape)  # its inverse swaps rows and columns in the same way
    for field in _BACKENDS[backend](chain([first], frames), video, rows, columns):
        vector = video.orientation.turn_vectors(field.vector)
        yield Field(field.index, vector, video.orientation.turn(field.covered))


_BACKENDS: Mapping[str, Callable[[Iterator[DecodedFrame], Video, int, int], Iterator[Field]]] = {
    "codec": lambda frames, video, rows, columns: read_fields(frames, video.codec, rows, columns, video.origin),
    "mestimate": lambda frames, video, rows, columns: estimate_fields(frames, rows, columns),
    "transcode": lambda frames, video, rows, columns: transcode_fields(frames, rows, columns),
}


def _remove_camera(field: Field) -> Field:
    """Subtract the median vector, which estimates the camera's motion if objects cover less than half of the frame."""
    known = field.covered > 0
    if not known.any():
        return field
    camera = np.median(field.vector[known], axis=0).astype(np.float32)
    return replace(field, vector=field.vector - camera)


def _check_complete(total: MotionSum, video: Video, decode_index: NDArray[np.integer]) -> None:
    if not total.complete:
        counts = f"{video.decoded} frames can be decoded, {decode_index[-1] + 1} when the frames were stored"
        raise VideoError(Status.TRUNCATED, f"{counts}: the file has changed; run the frames stage again")
    if not total.finish():
        reason = "no frame has motion vectors: each is coded by itself"
        raise VideoError(Status.UNSUPPORTED_MOTION, f"{reason}; set motion.backend to `mestimate` or `transcode`")
