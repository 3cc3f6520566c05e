"""Small shards whose clips have captions of several sources with text vectors, and weights that know them."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import simplejpeg
import torch
from training_shards import COLUMNS, FRAMES, HEIGHT, ROWS, WIDTH, make_frames, make_run

from stm.config import Contrast, PretrainRun
from stm.distributed.process import Process
from stm.evaluation.classification.clips import clips_to_test
from stm.evaluation.features import run_over
from stm.methods.contrast_head import EXTRA, ContrastHead
from stm.models.weights import zoo
from stm.storage.tables import write_table
from stm.storage.tars import TarWriter

SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("key", "video_id", "split", "label")),
        *((name, pa.list_(pa.string())) for name in ("captions", "caption_sources")),
        *((name, pa.int32()) for name in ("frames", "width", "height", "rows", "columns", "flow_cells", "text_width")),
        ("pts", pa.list_(pa.float64())),
        ("json_offset", pa.int64()),
        ("json_size", pa.int64()),
        ("offsets", pa.list_(pa.int64())),
        ("sizes", pa.list_(pa.int32())),
        *((f"{n}_{what}", pa.int64()) for n in ("similarity", "motion", "flow", "text") for what in ("offset", "size")),
        ("sha256", pa.list_(pa.string())),
    ]
)
RUN = make_run(contrast={"layers": 1, "temperature": 0.1}, optimisation={"epochs": 0})


@dataclass(frozen=True)
class CaptionedClip:
    """What is said of a clip."""

    label: str | None = None
    captions: Sequence[str] = ()
    sources: Sequence[str] = ()
    text: np.ndarray | None = None  # [K, D]


def write_captioned(index: Path, clips: Sequence[CaptionedClip], seed: int = 0, prefix: str = "clip") -> Path:
    """A shard of such clips; returns `index`."""
    index.parent.mkdir(parents=True, exist_ok=True)
    rng, rows = np.random.default_rng(seed), []
    with TarWriter(index.with_suffix(".tar")) as tar:
        for number, told in enumerate(clips):
            rows.append(_write_clip(tar, f"{prefix}-{number:03d}", told, make_frames(told.label, rng)))
    write_table(index, pa.Table.from_pylist(rows, SCHEMA), {"stage": "shards"})
    return index


def _write_clip(tar: TarWriter, key: str, told: CaptionedClip, video: np.ndarray) -> dict[str, Any]:
    row = dict.fromkeys(SCHEMA.names) | {"key": key, "video_id": key, "split": "test", "label": told.label}
    about = tar.add(f"{key}.json", b"{}")
    pictures = [simplejpeg.encode_jpeg(np.ascontiguousarray(frame), colorspace="RGB") for frame in video]
    frames = [tar.add(f"{key}.{t:04d}.jpg", picture) for t, picture in enumerate(pictures)]
    row |= {
        "captions": list(told.captions),
        "caption_sources": list(told.sources),
        "pts": [t / 4 for t in range(FRAMES)],
    }
    row |= {"frames": FRAMES, "width": WIDTH, "height": HEIGHT, "rows": ROWS, "columns": COLUMNS}
    row |= {"json_offset": about.offset, "json_size": about.size}
    row |= {"offsets": [frame.offset for frame in frames], "sizes": [frame.size for frame in frames]}
    row["sha256"] = [member.sha256 for member in (about, *frames)]
    if told.text is not None:
        file = io.BytesIO()
        np.save(file, told.text.astype(np.float16))
        text = tar.add(f"{key}.text.npy", file.getvalue())
        row |= {"text_offset": text.offset, "text_size": text.size, "text_width": told.text.shape[1]}
        row["sha256"].append(text.sha256)
    return row


def save_fitted(path: Path, task: Any, indexes: Sequence[Path], wanted: np.ndarray, run: PretrainRun = RUN) -> Path:
    """Weights of a random encoder, and of a linear head that maps its features of some clips to wanted vectors.

    Args:
        task: in whose first view the clips are seen.
        wanted: [clips, D], as good as least squares can.
    """
    torch.manual_seed(0)
    model = zoo.build(run).eval()
    clips = clips_to_test(task, run, indexes, 0)
    features = run_over(model.encoder.forward_features, clips, Process(0, 1, torch.device("cpu")), what="features")[
        :, 0
    ]
    inputs = np.concatenate([features, np.ones((len(features), 1))], axis=1)
    solution = np.linalg.lstsq(inputs, wanted, rcond=1e-4)[0]
    assert isinstance(run.contrast, Contrast)
    branch = ContrastHead(model.architecture.width, wanted.shape[1], run.contrast)
    with torch.no_grad():
        branch.head[-1].weight.copy_(torch.from_numpy(solution[:-1].T))
        branch.head[-1].bias.copy_(torch.from_numpy(solution[-1]))
    zoo.save(model, path, extra={EXTRA: branch.state_dict()}, header={EXTRA: branch.describe()})
    return path
