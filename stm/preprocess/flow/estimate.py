"""The flow stage: where each stored frame's content lies in the next frame, and in the one before (MGMAE)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from stm.config import BadInput, Flow
from stm.jobs.journal import Journal
from stm.manifest import check_failures
from stm.preprocess.captions.write import hash_frames
from stm.preprocess.clip_outcomes import Ended, Outcome, Record, as_columns, finished_rows, run_shard
from stm.preprocess.flow.dis import FlowTask, extract_clip
from stm.preprocess.frames.table import read_kept
from stm.storage.receipts import make_receipt
from stm.storage.tables import write_rows

FLOW_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("video_id", pa.string(), nullable=False),
        pa.field("frames", pa.int32(), nullable=False),  # T, stored frames
        pa.field("rows", pa.int32(), nullable=False),  # R: the map's, times flow.cells
        pa.field("columns", pa.int32(), nullable=False),  # C likewise
        # [T, R, C, 2], x right, y down, in widths and heights of the map's cells: displacement of frame t's content
        pa.field("forward", pa.list_(pa.float16())),  # to frame t + 1; of the last frame 0
        pa.field("backward", pa.list_(pa.float16())),  # to frame t - 1; of the first frame 0
        pa.field("status", pa.string(), nullable=False),
        pa.field("policy", pa.string(), nullable=False),
        pa.field("detail", pa.string(), nullable=False),
    ]
)
_ROW_GROUP = 4  # clips, of half a megabyte each and more
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
    """Writes the optical flow of one shard: one row for each clip that the frames stage kept; see `FLOW_SCHEMA`.

    The flow is that of the stored JPEGs, so that it fits what training sees. DIS works in processes of their own, with
    a deadline a clip; RAFT in this process, on the GPU when there is one.

    Args:
        frames_tar, frames_index: what the frames stage wrote.
        grid: cells on the short side of the maps; flow has `settings.cells` times as many.
        processes: clips that DIS works on at a time; the bytes do not depend on it.
        device: RAFT's; by default CUDA when there is any.

    Raises:
        TooManyFailures: more clips have no flow than `bad_input` allows; `output` is written by then.
        ModelError: RAFT's weights cannot be had.
        ValueError: the table of frames is missing or torn.
    """
    kept = read_kept(frames_index)
    used = {name: settings.fingerprint()[name] for name in _FINGERPRINTED[settings.backend]}
    receipt = make_receipt("flow", used, _LIBRARIES[settings.backend], grid=grid)
    title = f"flow {frames_tar.stem}"
    if settings.backend == "raft":
        # torch takes seconds to import; DIS does without.
        from stm.preprocess.flow.raft import Raft, run_raft

        raft = Raft(Path(settings.weights or "").expanduser(), settings.iterations, device)
        receipt |= {"model": raft.identity}
        journal = Journal(output, receipt)
        tasks = _make_tasks(kept, frames_tar, settings, grid, journal)
        failures = run_raft(raft, title, tasks)
    else:
        journal = Journal(output, receipt)
        tasks = _make_tasks(kept, frames_tar, settings, grid, journal)
        failures = run_shard(title, extract_clip, tasks, journal, processes, settings.timeout_seconds)
    outcomes: list[Ended] = []
    found = finished_rows(tasks, journal, failures, bad_input, _make_row, outcomes)
    more = {"frames": hash_frames(kept), "policy": bad_input.model_dump(mode="json")["policy"]}
    write_rows(output, FLOW_SCHEMA, found, receipt | more, _ROW_GROUP)
    check_failures("flow", outcomes, bad_input.max_failure_rate)
    journal.close()


def _make_tasks(
    kept: Sequence[dict[str, Any]], frames_tar: Path, settings: Flow, grid: int, journal: Journal
) -> list[FlowTask]:
    return [FlowTask(row, frames_tar, settings, grid, journal) for row in kept]


def _make_row(task: FlowTask, record: Record, outcome: Outcome) -> dict[str, Any]:
    found = [np.frombuffer(blob, np.float16) for blob in record.blobs]
    forward, backward = found if found else (None, None)
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
