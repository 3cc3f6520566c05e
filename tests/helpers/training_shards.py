"""Small packed shards, in the format of the stage `shards`, and runs that train on them."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import simplejpeg
from reference_shards import sum_parts, write_npy

from stm.config import PretrainRun
from stm.shards.schema import shard_schema
from stm.storage.files import sha256_file
from stm.storage.receipts import make_receipt
from stm.storage.tables import write_table
from stm.storage.tars import TarWriter

WIDTH = 40
HEIGHT = 32
FRAMES = 6
ROWS = 4
COLUMNS = 5
TEXT_WIDTH = 12
COLORS = {"red": (220, 40, 40), "green": (40, 220, 40), "blue": (40, 40, 220)}


def make_frames(label: str | None, rng: np.random.Generator) -> np.ndarray:
    """uint8 [FRAMES, HEIGHT, WIDTH, 3]: coarse noise, tinted by the label."""
    coarse = rng.integers(0, 256, (HEIGHT // 8, WIDTH // 8, 3)).astype(float)
    image = np.kron(coarse, np.ones((8, 8, 1)))
    tint = np.array(COLORS.get(label or "", (128, 128, 128)))
    return np.stack([np.roll(0.6 * image + 0.4 * tint, 2 * t, axis=1) for t in range(FRAMES)]).astype(np.uint8)


def random_unit_vectors(count: int, rng: np.random.Generator) -> np.ndarray:
    """Random unit vectors, float64 [count, TEXT_WIDTH]."""
    vectors = rng.normal(size=(count, TEXT_WIDTH))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def make_shard(
    index: Path,
    labels: Sequence[str | None],
    seed: int = 0,
    prefix: str = "clip",
    without_captions: Collection[int] = (),
    text_model: str = "made",
) -> Path:
    """Write a shard with one clip per label, with similarity, motion and text; return `index`.

    The clips whose numbers are in `without_captions` have no captions and therefore neither similarity nor text.
    """
    index.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    rows = []
    with TarWriter(index.with_suffix(".tar")) as tar:
        for number, label in enumerate(labels):
            key = f"{prefix}-{number:03d}"
            description = tar.add(f"{key}.json", b"{}")
            jpegs = [
                simplejpeg.encode_jpeg(np.ascontiguousarray(frame), colorspace="RGB")
                for frame in make_frames(label, rng)
            ]
            frames = [tar.add(f"{key}.{t:04d}.jpg", jpeg) for t, jpeg in enumerate(jpegs)]
            arrays = {
                "similarity": rng.uniform(-1, 1, (2, FRAMES, ROWS, COLUMNS)),
                "motion": rng.uniform(0, 2, (FRAMES, ROWS, COLUMNS, 3)),
                "text": random_unit_vectors(2, rng),
            }
            captions = [] if number in without_captions else ["one", "two"]
            names = sorted(arrays if captions else ["motion"])
            values = {name: arrays[name].astype(np.float16) for name in names}
            members = {name: tar.add(f"{key}.{name}.npy", write_npy(values[name])) for name in names}
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
                    "json_offset": description.offset,
                    "json_size": description.size,
                    "offsets": [frame.offset for frame in frames],
                    "sizes": [frame.size for frame in frames],
                    **sum_parts(jpegs, values),
                    **{f"{name}_offset": member.offset for name, member in members.items()},
                    **{f"{name}_size": member.size for name, member in members.items()},
                    "sha256": [member.sha256 for member in (description, *frames, *members.values())],
                }
            )
    receipt = make_receipt(
        "shards", {}, text_model=text_model, tar_sha256=sha256_file(index.with_suffix(".tar")), clips=len(rows)
    )
    write_table(index, pa.Table.from_pylist(rows, schema=shard_schema()), receipt)
    return index


def make_run(**changes: Any) -> PretrainRun:
    """A run that trains in seconds; changes of `optimisation` are merged into its settings, other changes replace them."""
    optimisation = {"epochs": 2, "batch_size": 4, "warmup_epochs": 1, "learning_rate": 0.01}
    optimisation |= changes.pop("optimisation", {})
    values = {"model": "tiny", "image_size": 32, "patch_size": 16, "frames": 4, "decoder_depth": 1, "workers": 0}
    mask = {"strategy": "text_top", "ratio": 0.5}
    return PretrainRun.model_validate({**values, "mask": mask, "optimisation": optimisation, **changes})
