"""Small shards in the format of the stage `shards`, and settings for them, for the tests of what trains on
them.
"""

import io
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import simplejpeg

from stm.config import PretrainRun
from stm.shards.schema import shard_schema
from stm.storage.files import sha256_file
from stm.storage.receipts import make_receipt
from stm.storage.tables import write_table
from stm.storage.tars import TarWriter

WIDTH, HEIGHT, FRAMES, ROWS, COLUMNS, TEXT_WIDTH = 40, 32, 6, 4, 5, 12
COLORS = {"red": (220, 40, 40), "green": (40, 220, 40), "blue": (40, 40, 220)}


def draw_clip(label: str | None, rng: np.random.Generator) -> np.ndarray:
    """uint8 [FRAMES, HEIGHT, WIDTH, 3]: coarse noise, tinted by the label."""
    coarse = rng.integers(0, 256, (HEIGHT // 8, WIDTH // 8, 3)).astype(float)
    picture = np.kron(coarse, np.ones((8, 8, 1)))
    tint = np.array(COLORS.get(label or "", (128, 128, 128)))
    return np.stack([np.roll(0.6 * picture + 0.4 * tint, 2 * t, axis=1) for t in range(FRAMES)]).astype(np.uint8)


def encode_map(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, values.astype(np.float16))
    return file.getvalue()


def draw_texts(count: int, rng: np.random.Generator) -> np.ndarray:
    """Unit vectors [count, TEXT_WIDTH]."""
    vectors = rng.normal(size=(count, TEXT_WIDTH))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def make_shard(
    index: Path,
    labels: Sequence[str | None],
    seed: int = 0,
    prefix: str = "clip",
    silent: Collection[int] = (),
    text_model: str = "made",
) -> Path:
    """Writes a shard with one clip a label, similarity, motion and text packed; returns `index`.

    The clips numbered in `silent` have no captions, hence neither similarity nor text.
    """
    index.parent.mkdir(parents=True, exist_ok=True)
    rng, rows = np.random.default_rng(seed), []
    with TarWriter(index.with_suffix(".tar")) as tar:
        for number, label in enumerate(labels):
            key = f"{prefix}-{number:03d}"
            about = tar.add(f"{key}.json", b"{}")
            frames = [
                tar.add(f"{key}.{t:04d}.jpg", simplejpeg.encode_jpeg(np.ascontiguousarray(frame), colorspace="RGB"))
                for t, frame in enumerate(draw_clip(label, rng))
            ]
            arrays = {
                "similarity": rng.uniform(-1, 1, (2, FRAMES, ROWS, COLUMNS)),
                "motion": rng.uniform(0, 2, (FRAMES, ROWS, COLUMNS, 3)),
                "text": draw_texts(2, rng),
            }
            captions = [] if number in silent else ["one", "two"]
            names = sorted(arrays if captions else ["motion"])
            added = {name: tar.add(f"{key}.{name}.npy", encode_map(arrays[name])) for name in names}
            rows.append(
                {
                    "key": key,
                    "video_id": key,
                    "split": index.parent.name,
                    "label": label,
                    "captions": captions,
                    "caption_sources": ["made"] * len(captions),
                    "text_width": TEXT_WIDTH if captions else None,
                    "frames": FRAMES,
                    "width": WIDTH,
                    "height": HEIGHT,
                    "rows": ROWS,
                    "columns": COLUMNS,
                    "pts": [t / 4 for t in range(FRAMES)],
                    "json_offset": about.offset,
                    "json_size": about.size,
                    "offsets": [frame.offset for frame in frames],
                    "sizes": [frame.size for frame in frames],
                    **{f"{name}_offset": member.offset for name, member in added.items()},
                    **{f"{name}_size": member.size for name, member in added.items()},
                    "sha256": [member.sha256 for member in (about, *frames, *added.values())],
                }
            )
    receipt = make_receipt(
        "shards", {}, text_model=text_model, tar_sha256=sha256_file(index.with_suffix(".tar")), clips=len(rows)
    )
    write_table(index, pa.Table.from_pylist(rows, schema=shard_schema()), receipt)
    return index


def make_run(**changes: Any) -> PretrainRun:
    """A run of seconds; `optimisation` is merged, the rest replaced."""
    optimisation = {"epochs": 2, "batch_size": 4, "warmup_epochs": 1, "learning_rate": 0.01}
    optimisation |= changes.pop("optimisation", {})
    values = {"model": "tiny", "image_size": 32, "patch_size": 16, "frames": 4, "decoder_depth": 1, "workers": 0}
    mask = {"strategy": "text_top", "ratio": 0.5}
    return PretrainRun.model_validate({**values, "mask": mask, "optimisation": optimisation, **changes})
