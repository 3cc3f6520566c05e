"""The captions stage: what is said about each clip, by the manifest, by templates or by a model."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from stm.config import (
    BadInput,
    Blip2Captions,
    CaptionSource,
    HumanCaptions,
    LabelCaptions,
    LanguageModelCaptions,
)
from stm.jobs.journal import Journal
from stm.jobs.status import Status
from stm.manifest import check_failures, read_status
from stm.preprocess.captions.templates import WHOLE_CLIP, ClipCaptions, human_captions, label_captions
from stm.preprocess.frames.table import read_kept, rows_of_kept
from stm.storage.receipts import hash_receipt, make_receipt
from stm.storage.tables import DamagedError, read_table, write_table

CAPTIONS_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("video_id", pa.string(), nullable=False),
        pa.field("caption_index", pa.int32(), nullable=False),  # from 0 within the clip
        pa.field("frame", pa.int32(), nullable=False),  # stored-frame number; -1: the whole clip
        pa.field("caption", pa.string()),  # null: the clip has none, see status
        pa.field("status", pa.string(), nullable=False),
        pa.field("policy", pa.string(), nullable=False),
        pa.field("detail", pa.string(), nullable=False),
    ]
)
MODEL_LIBRARIES = ("torch", "transformers", "tokenizers", "numpy", "simplejpeg", "pyarrow")


def write_captions(
    slice_path: Path,
    frames_tar: Path,
    frames_index: Path,
    output: Path,
    source: CaptionSource,
    bad_input: BadInput,
    device: str | None = None,
) -> None:
    """Captions the clips of a shard that the frames stage kept: a row a caption, sorted by key and caption_index.

    A clip some of whose captions are empty keeps the others, and its rows' `detail` says which are missing. A clip
    without any has one row, whose caption is null and whose status says why.

    Args:
        device: where a model computes; by default CUDA when there is any.

    Raises:
        TooManyFailures: more clips have no caption than the config allows.
        ModelError: the source's model cannot be had.
    """
    kept = read_kept(frames_index)
    rows = rows_of_kept(slice_path, kept)
    if isinstance(source, HumanCaptions | LabelCaptions):
        found = {row["key"]: _say(row, source) for row in rows}
        receipt, journal = make_receipt("captions", source, ("pyarrow",)), None
    else:
        found, receipt, journal = _ask_model(rows, kept, frames_tar, output, source, device)
    table = _make_table(rows, found, bad_input)
    write_table(output, table, receipt | {"policy": bad_input.model_dump(mode="json")["policy"]})
    check_failures(f"captions {output.stem}", _outcomes(rows, found, bad_input), bad_input.max_failure_rate)
    if journal is not None:
        journal.close()


def _say(row: Mapping[str, Any], source: HumanCaptions | LabelCaptions) -> ClipCaptions:
    return human_captions(row) if isinstance(source, HumanCaptions) else label_captions(row, source.templates)


def _ask_model(
    rows: list[dict[str, Any]],
    kept: list[dict[str, Any]],
    frames_tar: Path,
    output: Path,
    source: Blip2Captions | LanguageModelCaptions,
    device: str | None,
) -> tuple[dict[str, ClipCaptions], dict[str, Any], Journal]:
    """Captions by a model, with the receipt and the still open journal."""
    # The model libraries take seconds to import; captions without a model do without.
    if isinstance(source, Blip2Captions):
        from stm.preprocess.captions.blip2 import Blip2Captioner

        captioner = Blip2Captioner(source, device)
        receipt = _model_receipt(source, captioner.identity)
        journal = Journal(output, receipt | {"frames": hash_frames(kept)})
        return captioner.caption_clips(kept, frames_tar, journal), receipt, journal
    from stm.preprocess.captions.language_model import LanguageModel

    model = LanguageModel(source, device)
    receipt = _model_receipt(source, model.identity)
    journal = Journal(output, receipt | {"labels": sorted({row["label"] or "" for row in rows})})
    return model.describe_clips(rows, journal, output.stem), receipt, journal


def _model_receipt(source: Blip2Captions | LanguageModelCaptions, identity: Mapping[str, Any]) -> dict[str, Any]:
    settings = source.model_dump(mode="json") | {"model": identity["model"]}
    return make_receipt("captions", settings, MODEL_LIBRARIES, model=dict(identity))


def hash_frames(kept: Sequence[Mapping[str, Any]]) -> str:
    """One SHA-256 for the stored frames of a shard's kept clips: what anything made from them depends on."""
    return hash_receipt({row["key"]: row["sha256"] for row in kept})


def _make_table(rows: Sequence[Mapping[str, Any]], found: Mapping[str, ClipCaptions], bad_input: BadInput) -> pa.Table:
    lines = []
    for row in sorted(rows, key=lambda row: row["key"]):
        said = found[row["key"]]
        for index, (frame, caption) in enumerate(said.texts or [(WHOLE_CLIP, None)]):
            lines.append(
                {
                    "key": row["key"],
                    "video_id": row["video_id"],
                    "caption_index": index,
                    "frame": frame,
                    "caption": caption,
                    "status": str(said.status),
                    "policy": bad_input.action(said.status),
                    "detail": said.detail,
                }
            )
    return pa.Table.from_pylist(lines, schema=CAPTIONS_SCHEMA)


def _outcomes(
    rows: Sequence[Mapping[str, Any]], found: Mapping[str, ClipCaptions], bad_input: BadInput
) -> list[tuple[str, Status, Any, str]]:
    said = [(row["video_id"], found[row["key"]]) for row in rows]
    return [(video_id, s.status, bad_input.action(s.status), s.detail) for video_id, s in said]


def read_captions(path: Path) -> dict[str, ClipCaptions]:
    """The captions of each clip by key, in the order of caption_index.

    Raises:
        DamagedError: the file is missing, torn or no captions table.
    """
    texts: dict[str, list[tuple[int, str]]] = {}
    ends: dict[str, tuple[Status, str]] = {}
    expected: Counter[str] = Counter()
    for number, row in enumerate(read_table(path, schema=CAPTIONS_SCHEMA).to_pylist()):
        key = row["key"]
        if row["caption_index"] != expected[key]:
            raise DamagedError(
                f"{path}: row {number}: clip {row['video_id']!r:.100} has a caption numbered {row['caption_index']} where "
                f"{expected[key]} is expected; remove the file and run again"
            )
        expected[key] += 1
        said = texts.setdefault(key, [])
        ends[key] = (read_status(path, row), row["detail"])
        if row["caption"] is not None:
            said.append((row["frame"], row["caption"]))
    return {key: ClipCaptions(tuple(said), *ends[key]) for key, said in texts.items()}


def check_spoken(path: Path, said: Mapping[str, ClipCaptions]) -> None:
    """Refuses captions of which a clip has none without a reason.

    Raises:
        DamagedError: with the file and the first such clip.
    """
    odd = [key for key, end in said.items() if end.status == Status.OK and not end.texts]
    if odd:
        raise DamagedError(f"{path}: clip {odd[0]!r} is `ok` without a caption: a damaged table")
