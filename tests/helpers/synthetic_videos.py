"""Small videos with known content, encoded by the ffmpeg program, for tests of decoding."""

import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import imageio_ffmpeg
import numpy as np
import pyarrow as pa

from stm.manifest import MANIFEST_SCHEMA, make_key
from stm.storage.tables import write_table

FFMPEG = imageio_ffmpeg.get_ffmpeg_exe()
X264 = ("-c:v", "libx264", "-preset", "veryfast")


def ffmpeg(*arguments: str | Path, data: bytes | None = None) -> bytes:
    command = [FFMPEG, "-y", "-v", "error", *map(str, arguments)]
    return subprocess.run(command, input=data, check=True, capture_output=True).stdout


def make_video(path: Path, frames: np.ndarray, options: Sequence[str] = X264, rate: int = 25) -> Path:
    """Encode uint8 [F, H, W, 3] frames; `options` are ffmpeg's output options."""
    height, width = frames.shape[1:3]
    raw = ("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(rate), "-i", "-")
    ffmpeg(*raw, *options, "-pix_fmt", "yuv420p", path, data=frames.tobytes())
    return path


def make_pan(frames: int = 24, dx: float = 4, dy: float = 2, width: int = 224, height: int = 160) -> np.ndarray:
    """A texture that moves (dx, dy) pixels per frame, x to the right, y down: uint8 [F, H, W, 3]."""
    random = np.random.default_rng(7)
    margin = 20 + round(max(abs(dx), abs(dy)) * frames)
    world = np.zeros((height + 2 * margin, width + 2 * margin, 3), np.float32)
    for size, share in ((4, 0.3), (12, 0.4), (40, 0.3)):
        coarse = random.integers(0, 256, (world.shape[0] // size + 2, world.shape[1] // size + 2, 3))
        world += share * cv2.resize(coarse.astype(np.float32), world.shape[1::-1], interpolation=cv2.INTER_CUBIC)
    shifts = [np.array([[1, 0, n * dx - margin], [0, 1, n * dy - margin]], np.float32) for n in range(frames)]
    moved = [cv2.warpAffine(world, shift, (width, height)) for shift in shifts]
    return np.clip(np.stack(moved), 0, 255).astype(np.uint8)


def decode_by_program(path: Path, width: int, height: int, *options: str) -> np.ndarray:
    """The frames that the ffmpeg program decodes: uint8 [F, H, W, 3]."""
    raw = ffmpeg("-i", path, *options, "-fps_mode", "passthrough", "-f", "rawvideo", "-pix_fmt", "rgb24", "-")
    return np.frombuffer(raw, np.uint8).reshape(-1, height, width, 3)


def times_by_program(path: Path) -> list[float]:
    """The times in seconds of the frames that the ffmpeg program decodes."""
    show = ["-map", "0:v:0", "-vf", "showinfo", "-fps_mode", "passthrough", "-f", "null", "-"]
    command = [FFMPEG, "-nostdin", "-i", str(path), *show]
    log = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    return [float(time) for time in re.findall(r"pts_time:\s*(-?[\d.]+)", log)]


def make_row(path: str, **values: Any) -> dict[str, Any]:
    """A manifest row; unless `values` say otherwise, its id is the path."""
    empty: dict[str, Any] = dict.fromkeys(MANIFEST_SCHEMA.names)
    video_id = values.pop("video_id", path)
    return empty | {"video_id": video_id, "key": make_key(video_id), "path": path, "split": "train"} | values


def write_slice(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    table = pa.Table.from_pylist(sorted(rows, key=lambda row: row["key"]), schema=MANIFEST_SCHEMA)
    write_table(path, table, {"stage": "split"})
    return path
