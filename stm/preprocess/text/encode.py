"""The text stage: one vector per caption from a frozen text encoder, so that training and retrieval need no encoder."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from stm.config import BadInput, Text
from stm.jobs.journal import Journal
from stm.jobs.progress import Progress
from stm.manifest import check_failures
from stm.preprocess.captions.write import check_has_captions, read_captions
from stm.preprocess.clip_outcomes import Outcome, as_columns
from stm.pretrained.hub import ModelError
from stm.pretrained.text_encoder import TextEncoder
from stm.storage.receipts import hash_receipt, make_receipt
from stm.storage.tables import read_table, write_rows

TEXT_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("video_id", pa.string(), nullable=False),
        pa.field("captions", pa.list_(pa.string()), nullable=False),  # K
        pa.field("width", pa.int32(), nullable=False),  # D
        pa.field("text", pa.list_(pa.float16())),  # [K, D], unit length; null: the clip has no caption
        pa.field("status", pa.string(), nullable=False),  # as recorded by the captions stage
        pa.field("policy", pa.string(), nullable=False),
        pa.field("detail", pa.string(), nullable=False),
    ]
)
_LIBRARIES = ("torch", "open_clip_torch", "transformers", "tokenizers", "numpy", "pyarrow")
_ROW_GROUP = 64  # clips per row group


def write_text(captions: Path, output: Path, settings: Text, bad_input: BadInput, device: str | None = None) -> None:
    """Encode the captions of one source and shard: one row per clip, sorted by key; see `TEXT_SCHEMA`.

    Each distinct caption is encoded once, and batches span clips.

    Args:
        captions: output of the captions stage.
        device: defaults to CUDA if available.

    Raises:
        TooManyFailures: more clips lack captions than `bad_input` allows; raised after `output` is written.
        ModelError: the config's encoder cannot be loaded, or returns the same vector for all captions.
        DamagedError: the captions are missing or truncated.
    """
    captions_by_key = read_captions(captions)
    video_ids = _read_video_ids(captions)
    check_has_captions(captions, captions_by_key)
    encoder = TextEncoder.load(settings, device)
    texts_by_key = {key: [text for _, text in captions_by_key[key].texts] for key in sorted(captions_by_key)}
    # Record the encoder's identity instead of its folder's path, which does not affect the vectors.
    used = settings.model_dump(mode="json") | {"model": encoder.identity["model"]}
    receipt = make_receipt("text", used, _LIBRARIES, model=encoder.identity, captions=hash_receipt(texts_by_key))
    journal = Journal(output, receipt)
    width, vectors = _encode(encoder, texts_by_key, settings.batch_size, journal, f"text {output.stem}")
    receipt |= {"policy": bad_input.model_dump(mode="json")["policy"]}
    outcomes = {
        key: Outcome(clip.status, bad_input.action(clip.status), clip.detail) for key, clip in captions_by_key.items()
    }
    rows = _make_rows(video_ids, texts_by_key, outcomes, width, vectors)
    write_rows(output, TEXT_SCHEMA, rows, receipt, _ROW_GROUP)
    video_outcomes = [(video_ids[key], *outcomes[key]) for key in texts_by_key]
    check_failures(f"text {output.stem}", video_outcomes, bad_input.max_failure_rate)
    journal.close()


def _read_video_ids(captions: Path) -> dict[str, str]:
    """Read the video ids, by key."""
    table = read_table(captions, ["key", "video_id"])
    return dict(zip(table.column("key").to_pylist(), table.column("video_id").to_pylist(), strict=True))


def _encode(
    encoder: TextEncoder, texts_by_key: Mapping[str, Sequence[str]], batch_size: int, journal: Journal, title: str
) -> tuple[int, dict[str, np.ndarray]]:
    """Return the width D, and one float32 vector [D] per distinct caption."""
    unique = list(dict.fromkeys(text for texts in texts_by_key.values() for text in texts))
    vectors: list[np.ndarray] = []
    with Progress(title, len(unique), "captions") as progress:
        for start in range(0, len(unique), batch_size):
            texts = unique[start : start + batch_size]
            data = journal.get(str(start))  # its receipt hashes all captions, so the index identifies the batch
            part = encoder.encode(texts) if data is None else np.frombuffer(data, np.float32).reshape(len(texts), -1)
            if data is None:
                journal.put(str(start), part.tobytes())
            vectors.extend(part)
            progress.advance(len(part))
    # A causal model's first token attends only to itself, so `cls` pooling returns the same vector for all texts.
    if len(vectors) > 1 and all(np.array_equal(vectors[0], other) for other in vectors[1:]):
        raise ModelError(
            f"{encoder.identity['model']}: all {len(vectors)} captions get the same vector; set text.pooling to `mean` "
            "or use another model"
        )
    width = len(vectors[0]) if vectors else encoder.encode([]).shape[1]
    return width, dict(zip(unique, vectors, strict=True))


def _make_rows(
    video_ids: Mapping[str, str],
    texts_by_key: Mapping[str, Sequence[str]],
    outcomes: Mapping[str, Outcome],
    width: int,
    vectors: Mapping[str, np.ndarray],
) -> Iterator[dict[str, Any]]:
    for key, texts in texts_by_key.items():
        yield {
            "key": key,
            "video_id": video_ids[key],
            "captions": texts,
            "width": width,
            "text": np.stack([vectors[text] for text in texts]).astype(np.float16) if texts else None,
            **as_columns(outcomes[key]),
        }
