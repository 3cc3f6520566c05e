"""The flow stage: displacement of each stored frame's content to the next and to the previous frame (MGMAE)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from stm.config import BadInput, Flow
from stm.jobs.journal import Journal
from stm.jobs.workers import Failure
from stm.manifest import check_failures
from stm.preprocess.captions.write import hash_frames
from stm.preprocess.clip_outcomes import Outcome, Record, VideoOutcome, as_columns, finished_rows, run_shard
from stm.preprocess.flow.dis import FlowTask, extract_clip
from stm.preprocess.frames.table import read_kept
from stm.storage.receipts import make_receipt
from stm.storage.tables import write_rows

FLOW_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("video_id", pa.string(), nullable=False),
        pa.field("frames", pa.int32(), nullable=False),  # T, stored frames
        pa.field("rows", pa.int32(), nullable=False),  # R: rows of the map times flow.cells
        pa.field("columns", pa.int32(), nullable=False),  # C: columns of the map times flow.cells
        # [T, R, C, 2], x right, y down, in map-cell widths and heights: displacement of frame t's content
        pa.field("forward", pa.list_(pa.float16())),  # to frame t + 1; 0 for the last frame
        pa.field("backward", pa.list_(pa.float16())),  # to frame t - 1; 0 for the first frame
        pa.field("status", pa.string(), nullable=False),
        pa.field("policy", pa.string(), nullable=False),
        pa.field("detail", pa.string(), nullable=False),
    ]
)
_ROW_GROUP = 4  # clips per group; each takes half a megabyte or more, and readers load a whole group
_LIBRARIES = {
    "dis": ("opencv-python-headless", "numpy", "simplejpeg"),
    "raft": ("torch", "torchvision", "numpy", "simplejpeg"),
}
_FINGERPRINTED = {"dis": ("backend", "preset", "cells"), "raft": ("backend", "iterations", "cells")}


def write_flow(
    frames_tar: Path,
    frames_index: Path,
    output: Path,
    settings: Flow,
    grid: int,
    bad_input: BadInput,
    processes: int,
    device: str | None = None,
) -> None:
    """Write the optical flow of one shard: one row per clip that the frames stage kept; see `FLOW_SCHEMA`.

    Flow is estimated from the stored JPEGs, which training also reads. DIS runs in worker processes with a
    deadline per clip; RAFT runs in this process, on a GPU if available.

    Args:
        frames_tar, frames_index: outputs of the frames stage.
        grid: cells along the short side of the maps; flow has `settings.cells` times as many.
        processes: number of clips that DIS processes in parallel; it does not affect the output.
        device: device for RAFT; defaults to CUDA if available.

    Raises:
        TooManyFailures: more clips lack flow than `bad_input` allows; raised after `output` is written.
        ModelError: RAFT's weights cannot be loaded.
        DamagedError: the stored frames or their index are missing or damaged. Finished clips stay in the journal.
    """
    kept = read_kept(frames_index)
    # The other backend's settings do not affect this table, so changing them must not invalidate it.
    fingerprint = {name: settings.fingerprint()[name] for name in _FINGERPRINTED[settings.backend]}
    receipt = make_receipt("flow", fingerprint, _LIBRARIES[settings.backend], grid=grid)
    title = f"flow {frames_tar.stem}"
    if settings.backend == "raft":
        # torch takes seconds to import, and DIS does not need it.
        from stm.preprocess.flow.raft import Raft, run_raft

        raft = Raft(Path(settings.weights or "").expanduser(), settings.iterations, device)
        receipt |= {"model": raft.identity}
        journal = Journal(output, receipt)
        tasks = _make_tasks(kept, frames_tar, settings, grid, journal)
        failures: dict[str, Failure] = {}
        run_raft(raft, title, tasks)
    else:
        journal = Journal(output, receipt)
        tasks = _make_tasks(kept, frames_tar, settings, grid, journal)
        failures = run_shard(title, extract_clip, tasks, journal, processes, settings.timeout_seconds)
    outcomes: list[VideoOutcome] = []
    rows = finished_rows(tasks, journal, failures, bad_input, _make_row, outcomes)
    # The policy affects only statuses, and the frames are part of each journal item, so neither is in the journal's
    # receipt. Changing either therefore keeps the clips that are still valid.
    extra = {"frames": hash_frames(kept), "policy": bad_input.model_dump(mode="json")["policy"]}
    write_rows(output, FLOW_SCHEMA, rows, receipt | extra, _ROW_GROUP)
    check_failures("flow", outcomes, bad_input.max_failure_rate)
    journal.close()


def _make_tasks(
    kept: Sequence[dict[str, Any]], frames_tar: Path, settings: Flow, grid: int, journal: Journal
) -> list[FlowTask]:
    return [FlowTask(row, frames_tar, settings, grid, journal) for row in kept]


def _make_row(task: FlowTask, record: Record, outcome: Outcome) -> dict[str, Any]:
    maps = [np.frombuffer(blob, np.float16) for blob in record.blobs]
    forward, backward = maps if maps else (None, None)
    rows, columns = task.shape
    return {
        "key": task.frames["key"],
        "video_id": task.frames["video_id"],
        "frames": task.frames["frames"],
        "rows": rows,
        "columns": columns,
        "forward": forward,
        "backward": backward,
        **as_columns(outcome),
    }
