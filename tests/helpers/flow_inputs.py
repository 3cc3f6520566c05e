"""Frames with known motion in the format of the frames stage, and the flow stage on them."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import simplejpeg
import torch
from safetensors.torch import save_file
from torchvision.models.optical_flow import raft_small

from stm.config import BadInput, Flow
from stm.preprocess.flow.estimate import write_flow
from stm.preprocess.frames.table import FRAMES_SCHEMA
from stm.storage.tables import read_table, write_table
from stm.storage.tars import TarWriter

GRID = 5
KEEP_GOING = BadInput(max_failure_rate=1.0)
DIS = Flow()


def texture(frames: int, dx: float, dy: float, width: int, height: int, seed: int = 0) -> np.ndarray:
    """Grey frames of a sum of waves that moves by (dx, dy) pixels per frame, integer or not: uint8 [F, H, W, 3]."""
    rng = np.random.default_rng(seed)
    t, y, x = np.meshgrid(np.arange(frames), np.arange(height), np.arange(width), indexing="ij", sparse=True)
    total = np.zeros((frames, height, width))
    for _ in range(40):
        (u, v), phase = rng.normal(0, 0.25, 2), rng.uniform(0, 2 * np.pi)
        total += np.sin(u * (x - dx * t) + v * (y - dy * t) + phase)
    grey = np.clip(128 + 12 * total, 0, 255).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=-1)


def store(folder: Path, clips: dict[str, np.ndarray]) -> tuple[Path, Path]:
    """Write the frames of clips by key in the format of the frames stage; return the tar and its index."""
    folder.mkdir(exist_ok=True)
    tar = folder / "train-00000.tar"
    index = folder / "train-00000.parquet"
    rows = []
    with TarWriter(tar) as writer:
        for key, frames in sorted(clips.items()):
            jpegs = [simplejpeg.encode_jpeg(frame, 95, colorsubsampling="420") for frame in frames]
            members = [writer.add(f"{key}.{n:04d}.jpg", jpeg) for n, jpeg in enumerate(jpegs)]
            height, width = frames.shape[1:3]
            rows.append(
                dict.fromkeys(FRAMES_SCHEMA.names)
                | {"key": key, "video_id": key, "path": key, "status": "ok", "policy": "keep", "detail": ""}
                | {"kept": True, "frames": len(jpegs), "width": width, "height": height}
                | {"pts": [0.25 * n for n in range(len(jpegs))], "decode_index": list(range(len(jpegs)))}
                | {"offsets": [m.offset for m in members], "sizes": [m.size for m in members]}
                | {"sha256": [m.sha256 for m in members]}
            )
    write_table(index, pa.Table.from_pylist(rows, FRAMES_SCHEMA), {})
    return tar, index


def run(stored: tuple[Path, Path], output: Path, settings: Flow = DIS, processes: int = 1, **more: Any) -> Path:
    write_flow(*stored, output, settings, GRID, more.pop("bad_input", KEEP_GOING), processes, device="cpu")
    return output


def rows_of(path: Path) -> dict[str, dict[str, Any]]:
    """The rows of a flow table by key, with the flow as float32 [T, R, C, 2]."""
    rows = {row["key"]: row for row in read_table(path).to_pylist()}
    for row in rows.values():
        for name in ("forward", "backward"):
            if row[name] is not None:
                shape = (row["frames"], row["rows"], row["columns"], 2)
                row[name] = np.array(row[name], np.float32).reshape(shape)
    return rows


def save_raft(path: Path) -> Path:
    """Save a RAFT-small with random weights."""
    torch.manual_seed(0)
    save_file(raft_small(weights=None).state_dict(), path)
    return path


def raft(weights: Path, **more: Any) -> Flow:
    return Flow(backend="raft", weights=str(weights), **{"iterations": 2, **more})
