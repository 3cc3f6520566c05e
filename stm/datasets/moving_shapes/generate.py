"""The generated dataset `moving-shapes`: textured shapes moving over textured backgrounds, as H.264 files.

`generate` writes videos and annotations in the form of a downloaded dataset, and the ground truth: the box of each
object in each frame.
"""

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ffmpeg
import imageio_ffmpeg
import numpy as np
import pyarrow as pa

from stm.config import MovingShapesDataset
from stm.datasets.moving_shapes.clip_spec import (
    BACKGROUNDS,
    COLORS,
    TEXTURES,
    ClipSpec,
    clip_id,
    draw_clip_spec,
    part_boxes,
    true_boxes,
)
from stm.datasets.moving_shapes.motions import MOTIONS
from stm.datasets.moving_shapes.outlines import SHAPES
from stm.datasets.moving_shapes.render import RenderedClip, render_clip
from stm.datasets.moving_shapes.sentences import appearance_caption, caption_of, captioned, phrases, questions_of
from stm.jobs.journal import Journal
from stm.jobs.progress import Progress
from stm.jobs.workers import Failure, run_isolated
from stm.storage.files import atomic_path, read_json, sha256_file, write_json
from stm.storage.machine_errors import is_machine_error
from stm.storage.receipts import hash_receipt, make_receipt
from stm.storage.tables import write_table

__all__ = [
    "BACKGROUNDS",
    "COLORS",
    "MOTIONS",
    "SHAPES",
    "TEXTURES",
    "ClipSpec",
    "RenderedClip",
    "appearance_caption",
    "caption_of",
    "draw_clip_spec",
    "encode",
    "generate",
    "phrases",
    "questions_of",
    "render_clip",
]

ANNOTATION_SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("video_id", pa.string()),
        ("split", pa.string()),
        ("label", pa.string()),
        ("captions", pa.list_(pa.string())),
        ("questions", pa.list_(pa.struct([("question", pa.string()), ("answer", pa.string())]))),
    ]
)

TRUTH_SCHEMA = pa.schema(
    [
        ("video_id", pa.string()),
        ("split", pa.string()),
        ("label", pa.string()),
        ("shape", pa.string()),
        ("color", pa.string()),
        ("texture", pa.string()),
        ("background", pa.string()),
        ("camera", pa.string()),  # fixed | moving
        ("boxes", pa.list_(pa.float32())),  # [F, 4] flattened: x0, y0, x1, y1 of the named object in pixels
        ("distractor_boxes", pa.list_(pa.float32())),  # [M, F, 4] flattened; a companion is the first
        ("distractors", pa.int32()),  # M
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("frames", pa.int32()),  # F
    ]
)

# Columns of options, which are left out without the option.
COMPANION = pa.field("companion", pa.string())  # in step | independent
MOVING_BACKGROUND = (
    pa.field("background_motion", pa.string()),  # of the moving part; null: there is none
    pa.field(
        "background_boxes", pa.list_(pa.float32())
    ),  # of the moving part, [F, 4] flattened; [0, 4] if there is none
)

# H.264 with B-frames and sparse keyframes, as in downloaded datasets, so that the offline stages are tested on it.
# One thread and the bitexact flags make the bytes reproducible.
_ENCODER = {
    "vcodec": "libx264",
    "pix_fmt": "yuv420p",
    "crf": 20,
    "preset": "medium",
    "bf": 2,
    "g": 48,
    "threads": 1,
    "map_metadata": -1,
    "movflags": "+faststart",
    "flags:v": "+bitexact",
    "fflags": "+bitexact",
    "format": "mp4",
}


class EncodeError(RuntimeError):
    """ffmpeg failed to encode a clip; the message contains the end of its log."""


def encode(frames: np.ndarray[Any, np.dtype[np.uint8]], fps: int, path: Path) -> None:
    """Writes frames [F, H, W, 3] uint8 RGB as an H.264 MP4, atomically.

    Raises:
        EncodeError: ffmpeg failed.
    """
    height, width = frames.shape[1:3]
    images = ffmpeg.input("pipe:", format="rawvideo", pix_fmt="rgb24", s=f"{width}x{height}", framerate=fps)
    with atomic_path(path) as temporary:
        command = ffmpeg.output(images, str(temporary), **_ENCODER)
        command = command.global_args("-hide_banner", "-loglevel", "error").overwrite_output()
        arguments = command.compile(imageio_ffmpeg.get_ffmpeg_exe())
        done = subprocess.run(arguments, input=frames.tobytes(), capture_output=True, check=False)  # noqa: S603
        if done.returncode:
            raise EncodeError(f"{path}: ffmpeg failed: {done.stderr.decode(errors='replace')[-500:]}")


def video_path(split: str, video_id: str) -> str:
    """The path of a clip, relative to the dataset's folder."""
    return f"videos/{split}/{video_id}.mp4"


def generate(dataset: MovingShapesDataset, seed: int, folder: Path, processes: int) -> None:
    """Generates the dataset: `videos/{split}/{id}.mp4`, `annotations.parquet` and `truth.parquet` under `folder`.

    Complete videos with the same settings are reused; if `clips` has increased, only the new clips are generated. The
    same dataset settings and seed produce the same bytes.

    Args:
        processes: number of worker processes; 1: everything runs in this process.
    """
    seed = seed if dataset.seed is None else dataset.seed
    clips = [(split, index) for split in sorted(dataset.clips) for index in range(dataset.clips[split])]
    receipt = _clip_receipt(dataset, seed)
    journal = Journal(folder / "annotations.parquet", receipt)
    finished = _finished(folder, receipt, journal, clips)
    missing = [clip for clip in clips if clip_id(*clip) not in finished]
    with Progress("moving-shapes", len(clips), "clips") as progress:
        progress.resume(len(clips) - len(missing))
        for video_id, digest in _make_all(dataset, seed, folder, missing, processes):
            journal.put(video_id, digest.encode())
            finished[video_id] = digest
            progress.advance()
    specs = [draw_clip_spec(seed, split, index, dataset) for split, index in clips]
    _write_tables(specs, dataset, folder, make_receipt("generate", dataset.fingerprint(), _LIBRARIES, seed=seed))
    write_json(folder / "videos" / "made.json", {"receipt": hash_receipt(receipt), "sha256": finished})
    journal.close()


_LIBRARIES = ("numpy", "opencv-python-headless", "imageio-ffmpeg")


def _clip_receipt(dataset: MovingShapesDataset, seed: int) -> dict[str, Any]:
    """The receipt of the settings that the bytes of a single clip depend on; the number of clips is not among them."""
    settings = dataset.model_dump(mode="json", exclude={"clips", "label", "caption", "seed", "probe_timeout_seconds"})
    return make_receipt("generate", settings, _LIBRARIES, seed=seed, encoder={k: str(v) for k, v in _ENCODER.items()})


def _finished(folder: Path, receipt: dict[str, Any], journal: Journal, clips: list[tuple[str, int]]) -> dict[str, str]:
    """SHA-256 of the clips with complete files, by id, from the journal of this attempt or from an earlier run."""
    made = _read_made(folder / "videos" / "made.json", hash_receipt(receipt))
    finished = {}
    for split, index in clips:
        video_id = clip_id(split, index)
        entry = journal.get(video_id)
        digest = entry.decode() if entry else made.get(video_id)
        path = folder / video_path(split, video_id)
        if digest and path.is_file() and sha256_file(path) == digest:
            finished[video_id] = digest
    return finished


def _read_made(path: Path, receipt: str) -> dict[str, str]:
    try:
        made = read_json(path)
        return dict(made["sha256"]) if made["receipt"] == receipt else {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        if is_machine_error(error):
            raise
        return {}  # missing or damaged: all clips are regenerated


def _make_all(
    dataset: MovingShapesDataset, seed: int, folder: Path, clips: list[tuple[str, int]], processes: int
) -> Iterator[tuple[str, str]]:
    tasks = [_Task(clip, dataset, seed, folder) for clip in clips]
    # Starting processes would take longer than rendering so few clips.
    if processes <= 1 or len(clips) < 2 * processes:
        yield from map(_make_clip, tasks)
        return
    for index, made in run_isolated(_make_in_worker, tasks, processes, _TIMEOUT_SECONDS, _name):
        if isinstance(made, Failure):
            raise EncodeError(f"{_name(tasks[index])}: {made.detail}")
        yield made


_TIMEOUT_SECONDS = 3600.0  # per clip; generated clips take seconds at most


@dataclass(frozen=True)
class _Task:
    clip: tuple[str, int]  # split, index
    dataset: MovingShapesDataset
    seed: int
    folder: Path


def _name(task: _Task) -> str:
    return clip_id(*task.clip)


def _make_in_worker(task: _Task) -> tuple[str, str]:
    import cv2

    cv2.setNumThreads(1)  # the processes already use all cores
    return _make_clip(task)


def _make_clip(task: _Task) -> tuple[str, str]:
    """Renders and encodes one clip; returns its id and the SHA-256 of its file."""
    spec = draw_clip_spec(task.seed, *task.clip, task.dataset)
    path = task.folder / video_path(spec.split, spec.video_id)
    encode(render_clip(spec).frames, spec.fps, path)
    return spec.video_id, sha256_file(path)


def _write_tables(specs: list[ClipSpec], dataset: MovingShapesDataset, folder: Path, receipt: dict[str, Any]) -> None:
    specs = sorted(specs, key=lambda spec: spec.video_id)
    annotations = [_annotation(spec, dataset) for spec in specs]
    truth = [_truth(spec) for spec in specs]
    schema = TRUTH_SCHEMA
    if dataset.companion is not None:
        schema = schema.append(COMPANION)
    if dataset.moving_background:
        schema = pa.schema([*schema, *MOVING_BACKGROUND])
    write_table(folder / "truth.parquet", pa.Table.from_pylist(truth, schema), receipt)
    write_table(folder / "annotations.parquet", pa.Table.from_pylist(annotations, ANNOTATION_SCHEMA), receipt)


def _annotation(spec: ClipSpec, dataset: MovingShapesDataset) -> dict[str, Any]:
    """A row of the annotations; `dataset.label` is the property of the named object that serves as the class."""
    return {
        "path": video_path(spec.split, spec.video_id),
        "video_id": spec.video_id,
        "split": spec.split,
        "label": getattr(spec.named, dataset.label),
        "captions": [captioned(spec, dataset.caption)],
        "questions": questions_of(spec),
    }


def _truth(spec: ClipSpec) -> dict[str, Any]:
    others = [true_boxes(item, spec).ravel() for item in spec.distractors]
    return {
        "video_id": spec.video_id,
        "split": spec.split,
        "label": spec.label,
        "shape": spec.named.shape,
        "color": spec.named.color,
        "texture": spec.named.texture,
        "background": spec.background,
        "camera": "moving" if spec.camera.moving else "fixed",
        "boxes": true_boxes(spec.named, spec).ravel(),
        "distractor_boxes": np.concatenate(others) if others else np.zeros(0, np.float32),
        "distractors": len(spec.distractors),
        "width": spec.width,
        "height": spec.height,
        "frames": spec.frames,
        COMPANION.name: spec.companion,
        MOVING_BACKGROUND[0].name: spec.part and spec.part.path.motion,
        MOVING_BACKGROUND[1].name: part_boxes(spec).ravel(),
    }
