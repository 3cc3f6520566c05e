"""The text stage: one vector for each caption, by a frozen text encoder, so that training and retrieval run none."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from stm.config import BadInput, Text
from stm.jobs.journal import Journal
from stm.jobs.progress import Progress
from stm.manifest import check_failures
from stm.preprocess.captions.write import check_spoken, read_captions
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
        pa.field("text", pa.list_(pa.float16())),  # [K, D], each of length 1; null: the clip has no caption
        pa.field("status", pa.string(), nullable=False),  # the captions stage's
        pa.field("policy", pa.string(), nullable=False),
        pa.field("detail", pa.string(), nullable=False),
    ]
)
_LIBRARIES = ("torch", "open_clip_torch", "transformers", "tokenizers", "numpy", "pyarrow")
_ROW_GROUP = 64  # clips


def write_text(captions: Path, output: Path, settings: Text, bad_input: BadInput, device: str | None = None) -> None:
    """Encodes the captions of one source and shard: one row a clip, sorted by key; see `TEXT_SCHEMA`.

    Each different caption is encoded once; batches are filled across clips.

    Args:
        captions: what the captions stage wrote.
        device: by default CUDA when there is any.

    Raises:
        TooManyFailures: more clips have no caption than `bad_input` allows; `output` is written by then.
        ModelError: the config's encoder cannot be had, or tells no caption from another.
        DamagedError: the captions are missing or torn.
    """
    said, names = read_captions(captions), _read_names(captions)
    check_spoken(captions, said)
    encoder = TextEncoder.load(settings, device)
    worded = {key: [text for _, text in said[key].texts] for key in sorted(said)}
    # The folder that a model lies in is no part of what it makes.
    used = settings.model_dump(mode="json") | {"model": encoder.identity["model"]}
    receipt = make_receipt("text", used, _LIBRARIES, model=encoder.identity, captions=hash_receipt(worded))
    journal = Journal(output, receipt)
    width, vectors = _encode(encoder, worded, settings.batch_size, journal, f"text {output.stem}")
    receipt |= {"policy": bad_input.model_dump(mode="json")["policy"]}
    ends = {key: Outcome(end.status, bad_input.action(end.status), end.detail) for key, end in said.items()}
    write_rows(output, TEXT_SCHEMA, _make_rows(names, worded, ends, width, vectors), receipt, _ROW_GROUP)
    outcomes = [(names[key], *ends[key]) for key in worded]
    check_failures(f"text {output.stem}", outcomes, bad_input.max_failure_rate)
    journal.close()


def _read_names(captions: Path) -> dict[str, str]:
    """Each clip's id by its key."""
    table = read_table(captions, ["key", "video_id"])
    return dict(zip(table.column("key").to_pylist(), table.column("video_id").to_pylist(), strict=True))


def _encode(
    encoder: TextEncoder, worded: Mapping[str, Sequence[str]], batch_size: int, journal: Journal, title: str
) -> tuple[int, dict[str, np.ndarray]]:
    """The width D, and float32 [D] of each different caption."""
    different = list(dict.fromkeys(text for texts in worded.values() for text in texts))
    found: list[np.ndarray] = []
    with Progress(title, len(different), "captions") as progress:
        for start in range(0, len(different), batch_size):
            texts = different[start : start + batch_size]
            data = journal.get(str(start))  # the journal's receipt has all captions in it, so a number will do
            part = encoder.encode(texts) if data is None else np.frombuffer(data, np.float32).reshape(len(texts), -1)
            if data is None:
                journal.put(str(start), part.tobytes())
            found.extend(part)
            progress.advance(len(part))
    # The first token of a model that reads from left to right has seen nothing of the text.
    if len(found) > 1 and all(np.array_equal(found[0], other) for other in found[1:]):
        raise ModelError(
            f"{encoder.identity['model']}: all {len(found)} captions get the same vector; set text.pooling to `mean` or "
            "take another model"
        )
    width = len(found[0]) if found else encoder.encode([]).shape[1]
    return width, dict(zip(different, found, strict=True))


def _make_rows(
    names: Mapping[str, str],
    worded: Mapping[str, Sequence[str]],
    ends: Mapping[str, Outcome],
    width: int,
    vectors: Mapping[str, np.ndarray],
) -> Iterator[dict[str, Any]]:
    for key, texts in worded.items():
        yield {
            "key": key,
            "video_id": names[key],
            "captions": texts,
            "width": width,
            "text": np.stack([vectors[text] for text in texts]).astype(np.float16) if texts else None,
            **as_columns(ends[key]),
        }
