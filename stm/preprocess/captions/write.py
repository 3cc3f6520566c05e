"""The captions stage: captions of each clip from the manifest, from templates or from a model."""

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
    VisionLanguageCaptions,
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
        pa.field("caption_index", pa.int32(), nullable=False),  # from 0, within the clip
        pa.field("frame", pa.int32(), nullable=False),  # index of the stored frame; -1 for the whole clip
        pa.field("caption", pa.string()),  # null if the clip has no caption; the status is the reason
        pa.field("status", pa.string(), nullable=False),
        pa.field("policy", pa.string(), nullable=False),
        pa.field("detail", pa.string(), nullable=False),
    ]
)
ModelCaptions = Blip2Captions | LanguageModelCaptions | VisionLanguageCaptions
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
    """Caption the clips of a shard that the frames stage kept: one row per caption, sorted by key and caption_index.

    If some captions of a clip are empty, the others are kept, and `detail` lists the empty ones. A clip without any
    caption has one row with a null caption and a status that states the reason.

    Args:
        slice_path: the shard's clips (MANIFEST_SCHEMA, sorted by key).
        frames_tar, frames_index: outputs of the frames stage.
        device: device for the model, if any; defaults to CUDA if available.

    Raises:
        TooManyFailures: more clips lack captions than the config allows; raised after `output` is written.
        ModelError: the source's model cannot be loaded.
    """
    kept = read_kept(frames_index)
    rows = rows_of_kept(slice_path, kept)
    if isinstance(source, HumanCaptions | LabelCaptions):
        captions_by_key = {row["key"]: _manifest_captions(row, source) for row in rows}
        receipt, journal = make_receipt("captions", source, ("pyarrow",)), None
    else:
        captions_by_key, receipt, journal = _model_captions(rows, kept, frames_tar, output, source, device)
    table = _make_table(rows, captions_by_key, bad_input)
    write_table(output, table, receipt | {"policy": bad_input.model_dump(mode="json")["policy"]})
    check_failures(f"captions {output.stem}", _outcomes(rows, captions_by_key, bad_input), bad_input.max_failure_rate)
    if journal is not None:
        journal.close()


def _manifest_captions(row: Mapping[str, Any], source: HumanCaptions | LabelCaptions) -> ClipCaptions:
    return human_captions(row) if isinstance(source, HumanCaptions) else label_captions(row, source.templates)


def _model_captions(
    rows: list[dict[str, Any]],
    kept: list[dict[str, Any]],
    frames_tar: Path,
    output: Path,
    source: ModelCaptions,
    device: str | None,
) -> tuple[dict[str, ClipCaptions], dict[str, Any], Journal]:
    """Return a model's captions by key, with the receipt and the journal, which is still open."""
    # The model libraries take seconds to import and are not needed by other sources.
    if isinstance(source, Blip2Captions):
        from stm.preprocess.captions.blip2 import Blip2Captioner

        captioner = Blip2Captioner(source, device)
        receipt = _model_receipt(source, captioner.identity)
        journal = Journal(output, receipt | {"frames": hash_frames(kept)})
        return captioner.caption_clips(kept, frames_tar, journal), receipt, journal
    if isinstance(source, VisionLanguageCaptions):
        from stm.preprocess.captions.vision_language import VisionLanguageModel

        answering = VisionLanguageModel(source, device)
        receipt = _model_receipt(source, answering.identity)
        times = hash_receipt(
            {row["key"]: row["pts"] for row in kept}
        )  # videos are shown with the times of their frames
        journal = Journal(output, receipt | {"frames": hash_frames(kept), "times": times})
        return answering.caption_clips(kept, frames_tar, journal), receipt, journal
    from stm.preprocess.captions.language_model import LanguageModel

    model = LanguageModel(source, device)
    receipt = _model_receipt(source, model.identity)
    journal = Journal(output, receipt | {"labels": sorted({row["label"] or "" for row in rows})})
    return model.describe_clips(rows, journal, output.stem), receipt, journal


def _model_receipt(source: ModelCaptions, identity: Mapping[str, Any]) -> dict[str, Any]:
    settings = source.model_dump(mode="json") | {"model": identity["model"]}
    resizing = ("torchvision", "pillow") if isinstance(source, VisionLanguageCaptions) else ()
    return make_receipt("captions", settings, MODEL_LIBRARIES + resizing, model=dict(identity))


def hash_frames(kept: Sequence[Mapping[str, Any]]) -> str:
    """Return one SHA-256 over the stored frames of a shard's kept clips, for the receipts of stages that read them."""
    return hash_receipt({row["key"]: row["sha256"] for row in kept})


def _make_table(
    rows: Sequence[Mapping[str, Any]], captions_by_key: Mapping[str, ClipCaptions], bad_input: BadInput
) -> pa.Table:
    lines = []
    for row in sorted(rows, key=lambda row: row["key"]):
        captions = captions_by_key[row["key"]]
        for index, (frame, caption) in enumerate(captions.texts or [(WHOLE_CLIP, None)]):
            lines.append(
                {
                    "key": row["key"],
                    "video_id": row["video_id"],
                    "caption_index": index,
                    "frame": frame,
                    "caption": caption,
                    "status": str(captions.status),
                    "policy": bad_input.action(captions.status),
                    "detail": captions.detail,
                }
            )
    return pa.Table.from_pylist(lines, schema=CAPTIONS_SCHEMA)


def _outcomes(
    rows: Sequence[Mapping[str, Any]], captions_by_key: Mapping[str, ClipCaptions], bad_input: BadInput
) -> list[tuple[str, Status, Any, str]]:
    clips = [(row["video_id"], captions_by_key[row["key"]]) for row in rows]
    return [(video_id, clip.status, bad_input.action(clip.status), clip.detail) for video_id, clip in clips]


def read_captions(path: Path) -> dict[str, ClipCaptions]:
    """Read the captions of each clip, by key, in the order of caption_index.

    Raises:
        DamagedError: the file is missing, truncated or not a captions table.
    """
    texts: dict[str, list[tuple[int, str]]] = {}
    status_and_detail: dict[str, tuple[Status, str]] = {}
    expected: Counter[str] = Counter()
    for number, row in enumerate(read_table(path, schema=CAPTIONS_SCHEMA).to_pylist()):
        key = row["key"]
        if row["caption_index"] != expected[key]:
            raise DamagedError(
                f"{path}: row {number}: clip {row['video_id']!r:.100} has caption_index {row['caption_index']} where "
                f"{expected[key]} is expected; remove the file and run again"
            )
        expected[key] += 1
        clip_texts = texts.setdefault(key, [])
        status_and_detail[key] = (read_status(path, row), row["detail"])
        if row["caption"] is not None:
            clip_texts.append((row["frame"], row["caption"]))
    return {key: ClipCaptions(tuple(pairs), *status_and_detail[key]) for key, pairs in texts.items()}


def check_has_captions(path: Path, captions_by_key: Mapping[str, ClipCaptions]) -> None:
    """Check that every clip whose status is `ok` has a caption.

    Raises:
        DamagedError: names the file and the first clip without one.
    """
    empty = [key for key, clip in captions_by_key.items() if clip.status == Status.OK and not clip.texts]
    if empty:
        raise DamagedError(
            f"{path}: clip {empty[0]!r} is `ok` without a caption: the table is damaged. Remove it and run the "
            "captions stage again"
        )
