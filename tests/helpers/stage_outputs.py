"""A small shard in the formats of the split, frames, motion and flow stages, for tests of the stages that read them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import simplejpeg

from stm.manifest import MANIFEST_SCHEMA, make_key
from stm.preprocess.flow.estimate import FLOW_SCHEMA
from stm.preprocess.frames.table import FRAMES_SCHEMA
from stm.shards.grid import map_shape
from stm.storage.tables import write_rows, write_table
from stm.storage.tars import TarWriter

MOTION_SCHEMA = pa.schema(
    {
        "key": pa.string(),
        "video_id": pa.string(),
        "frames": pa.int32(),
        "rows": pa.int32(),
        "columns": pa.int32(),
        "magnitude": pa.list_(pa.float16()),
        "vector": pa.list_(pa.float16()),
        "intra": pa.list_(pa.uint8()),
        "status": pa.string(),
        "policy": pa.string(),
        "detail": pa.string(),
    }
)


@dataclass
class Clip:
    """A clip to write."""

    video_id: str
    frames: int = 3
    width: int = 40
    height: int = 32
    label: str | None = "opening_a_door"
    captions: list[str] | None = None
    kept: bool = True

    @property
    def key(self) -> str:
        return make_key(self.video_id)


@dataclass
class StageOutputs:
    """Paths of the files of one shard."""

    slice: Path
    tar: Path
    index: Path
    motion: Path
    folder: Path

    @property
    def flow(self) -> Path:
        return self.folder / "flow.parquet"


def make_stage_outputs(
    folder: Path, clips: Sequence[Clip], grid: int = 4, seed: int = 0, cells: int = 2
) -> StageOutputs:
    """Write the slice, frames, motion and flow of clips with random images, motion and flow."""
    folder.mkdir(parents=True, exist_ok=True)
    files = StageOutputs(
        slice=folder / "slice.parquet",
        tar=folder / "train-00000.tar",
        index=folder / "train-00000.parquet",
        motion=folder / "motion.parquet",
        folder=folder,
    )
    rng = np.random.default_rng(seed)
    ordered = sorted(clips, key=lambda clip: clip.key)
    write_table(files.slice, pa.Table.from_pylist([_manifest_row(c) for c in ordered], MANIFEST_SCHEMA), {})
    with TarWriter(files.tar) as tar:
        rows = [_frames_row(tar, clip, rng) for clip in ordered]
    write_table(files.index, pa.Table.from_pylist(rows, FRAMES_SCHEMA), {})
    motion = [_motion_row(clip, grid, rng) for clip in ordered if clip.kept]
    write_table(files.motion, pa.Table.from_pylist(motion, MOTION_SCHEMA), {})
    rng = np.random.default_rng([seed, 1])
    flow = [_flow_row(clip, grid, cells, rng) for clip in ordered if clip.kept]
    write_rows(files.flow, FLOW_SCHEMA, flow, {}, group=2)
    return files


def _manifest_row(clip: Clip) -> dict[str, Any]:
    return {
        "video_id": clip.video_id,
        "key": clip.key,
        "path": f"{clip.key}.mp4",
        "split": "train",
        "label": clip.label,
        "captions": clip.captions,
        "questions": [{"question": "what?", "answer": "that"}],
    }


def _frames_row(tar: TarWriter, clip: Clip, rng: np.random.Generator) -> dict[str, Any]:
    count = clip.frames if clip.kept else 0
    members = []
    if clip.kept:
        tar.add(f"{clip.key}.json", b"{}")
    for number in range(count):
        coarse = rng.integers(0, 256, (6, 7, 3), dtype=np.uint8)
        image = coarse.repeat(-(-clip.height // 6), 0)[: clip.height].repeat(-(-clip.width // 7), 1)[:, : clip.width]
        jpeg = simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality=95)
        members.append(tar.add(f"{clip.key}.{number:04d}.jpg", jpeg))
    status = ("ok", "keep", "") if clip.kept else ("too_short", "drop", "1 frame")
    return {
        "key": clip.key,
        "video_id": clip.video_id,
        "path": f"{clip.key}.mp4",
        **dict(zip(("status", "policy", "detail"), status, strict=True)),
        "kept": clip.kept,
        "frames": count,
        "width": clip.width,
        "height": clip.height,
        "source_width": clip.width,
        "source_height": clip.height,
        "pts": [0.25 * number for number in range(count)],
        "decode_index": [4 * number for number in range(count)],
        "offsets": [member.offset for member in members],
        "sizes": [member.size for member in members],
        "sha256": [member.sha256 for member in members],
    }


def _motion_row(clip: Clip, grid: int, rng: np.random.Generator) -> dict[str, Any]:
    rows, columns = map_shape(clip.width, clip.height, grid)
    cells = clip.frames * rows * columns
    vector = rng.normal(size=(cells, 2)).astype(np.float16)
    return {
        "key": clip.key,
        "video_id": clip.video_id,
        "frames": clip.frames,
        "rows": rows,
        "columns": columns,
        "magnitude": np.hypot(*vector.T).astype(np.float16),
        "vector": vector.reshape(-1),
        "intra": np.zeros(cells, np.uint8),
        "status": "ok",
        "policy": "keep",
        "detail": "",
    }


def _flow_row(clip: Clip, grid: int, cells: int, rng: np.random.Generator) -> dict[str, Any]:
    rows, columns = (cells * side for side in map_shape(clip.width, clip.height, grid))
    forward, backward = rng.normal(size=(2, clip.frames, rows, columns, 2)).astype(np.float16)
    forward[-1], backward[0] = 0, 0
    names = {"key": clip.key, "video_id": clip.video_id, "frames": clip.frames, "rows": rows, "columns": columns}
    return names | {"forward": forward, "backward": backward, "status": "ok", "policy": "keep", "detail": ""}
