"""The similarity stage: how much each patch of each stored frame resembles each caption (TGM, section 3.3)."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from stm.config import BadInput, Similarity
from stm.jobs.journal import Journal
from stm.jobs.progress import Progress
from stm.manifest import check_failures
from stm.preprocess.captions.templates import ClipCaptions
from stm.preprocess.captions.write import check_spoken, hash_frames, read_captions
from stm.preprocess.frames.table import read_kept
from stm.preprocess.similarity.patch_scorer import PatchScorer, cosine, embed_clips
from stm.pretrained.clip import load_clip
from stm.shards.grid import map_shape
from stm.storage.receipts import hash_receipt, make_receipt
from stm.storage.tables import DamagedError, read_receipt, stream_rows, write_rows

EMBEDDINGS_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("video_id", pa.string(), nullable=False),
        pa.field("frames", pa.int32(), nullable=False),  # T
        pa.field("rows", pa.int32(), nullable=False),  # R
        pa.field("columns", pa.int32(), nullable=False),  # C
        pa.field("width", pa.int32(), nullable=False),  # D
        pa.field("embeddings", pa.list_(pa.float16()), nullable=False),  # [T, R, C, D], of length 1
    ]
)
SIMILARITY_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("video_id", pa.string(), nullable=False),
        pa.field("captions", pa.list_(pa.string()), nullable=False),  # K
        pa.field("frames", pa.int32(), nullable=False),  # T
        pa.field("rows", pa.int32(), nullable=False),  # R
        pa.field("columns", pa.int32(), nullable=False),  # C
        pa.field("similarity", pa.list_(pa.float16())),  # [K, T, R, C], cosine; null: the clip has no caption
        pa.field("status", pa.string(), nullable=False),  # the captions stage's
        pa.field("policy", pa.string(), nullable=False),
        pa.field("detail", pa.string(), nullable=False),
    ]
)
_LIBRARIES = ("torch", "open_clip_torch", "timm", "numpy", "simplejpeg", "pyarrow")
_CLIPS_A_GROUP = 16  # similarity maps are read a few clips at a time; embeddings are megabytes and go one by one

Row = Mapping[str, Any]


def write_embeddings(
    frames_tar: Path,
    frames_index: Path,
    output: Path,
    settings: Similarity,
    grid: int,
    device: str | None = None,
) -> None:
    """Embeds every patch of every stored frame of a shard's kept clips; large (megabytes a clip).

    Raises:
        ModelError: the config's model cannot be had.
    """
    kept = read_kept(frames_index)
    clip = load_clip(settings.model, settings.precision, device)
    scorer = PatchScorer(clip, grid, settings.batch_size, settings.compile)
    receipt = _make_receipt("embeddings", settings, scorer, kept)
    journal = Journal(output, receipt)
    _fill_journal(scorer, frames_tar, kept, set(), journal, "embeddings", lambda _, embeddings: embeddings)
    write_rows(output, EMBEDDINGS_SCHEMA, _embedding_rows(kept, grid, journal), receipt, group=1)
    journal.close()


def write_similarity(
    frames_tar: Path,
    frames_index: Path,
    captions: Path,
    output: Path,
    settings: Similarity,
    grid: int,
    bad_input: BadInput,
    embeddings: Path | None = None,
    device: str | None = None,
) -> None:
    """Scores every patch of every stored frame of a shard's kept clips against each caption of its clip.

    Args:
        embeddings: what `write_embeddings` wrote for the same frames, model and grid; then the image tower does not
            run. The bytes are the same with and without (at the same batch size).

    Raises:
        TooManyFailures: more clips have no caption than the config allows.
        ModelError: the config's model cannot be had.
        DamagedError: captions or embeddings belong to other frames.
    """
    kept, said = read_kept(frames_index), read_captions(captions)
    _check_captions(kept, said, captions)
    clip = load_clip(settings.model, settings.precision, device)
    scorer = PatchScorer(clip, grid, settings.batch_size, settings.compile)
    texts = _embed_captions(scorer, kept, said)
    worded = {row["key"]: [text for _, text in said[row["key"]].texts] for row in kept}
    receipt = _make_receipt("similarity", settings, scorer, kept) | {"captions": hash_receipt(worded)}
    journal = Journal(output, receipt)

    def score(row: Row, found: np.ndarray) -> np.ndarray:
        return cosine(found, np.stack([texts[text] for text in worded[row["key"]]]))

    if embeddings is None:
        mute = {key for key, words in worded.items() if not words}
        _fill_journal(scorer, frames_tar, kept, mute, journal, "similarity", score)
        maps: Iterable[np.ndarray | None] = (_stored_map(journal, row["key"]) for row in kept)
    else:
        _check_embeddings(embeddings, _make_receipt("embeddings", settings, scorer, kept))
        maps = _score_stored(embeddings, kept, worded, score)
    rows = _similarity_rows(kept, said, maps, grid, bad_input)
    policy = {"policy": bad_input.model_dump(mode="json")["policy"]}
    write_rows(output, SIMILARITY_SCHEMA, rows, receipt | policy, _CLIPS_A_GROUP)
    ends = [(row["video_id"], said[row["key"]]) for row in kept]
    outcomes = [(video_id, end.status, bad_input.action(end.status), end.detail) for video_id, end in ends]
    check_failures(f"similarity {output.stem}", outcomes, bad_input.max_failure_rate)
    journal.close()


def _make_receipt(stage: str, settings: Similarity, scorer: PatchScorer, kept: Sequence[Row]) -> dict[str, Any]:
    identity = scorer.clip.identity
    # Whether embeddings are kept changes no byte of a map, so the receipt does not say it.
    used = settings.fingerprint() | {"model": identity["model"]}
    return make_receipt(stage, used, _LIBRARIES, model=identity, grid=scorer.grid, frames=hash_frames(kept))


def _fill_journal(
    scorer: PatchScorer,
    frames_tar: Path,
    kept: Sequence[Row],
    skipped: set[str],
    journal: Journal,
    what: str,
    make: Callable[[Row, np.ndarray], np.ndarray],
) -> None:
    """Computes what the journal lacks: for each clip the bytes of `make(row, embeddings)`."""
    finished = skipped | {row["key"] for row in kept if journal.get(row["key"]) is not None}
    with Progress(f"{what} {frames_tar.stem}", len(kept), "clips") as progress:
        progress.resume(len(finished))
        for row, embeddings in embed_clips(scorer, frames_tar, kept, finished):
            journal.put(row["key"], make(row, embeddings).tobytes())
            progress.advance()


# ---------------------------------------------------------------------------------------------------------- tables


def _embedding_rows(kept: Sequence[Row], grid: int, journal: Journal) -> Iterator[dict[str, Any]]:
    for row in kept:
        data = journal.get(row["key"])
        assert data is not None, row["key"]
        flat = np.frombuffer(data, np.float16)
        rows, columns = map_shape(row["width"], row["height"], grid)
        yield {
            "key": row["key"],
            "video_id": row["video_id"],
            "frames": row["frames"],
            "rows": rows,
            "columns": columns,
            "width": len(flat) // (row["frames"] * rows * columns),
            "embeddings": flat,
        }


def _similarity_rows(
    kept: Sequence[Row],
    said: Mapping[str, ClipCaptions],
    maps: Iterable[np.ndarray | None],
    grid: int,
    bad_input: BadInput,
) -> Iterator[dict[str, Any]]:
    for row, similarity in zip(kept, maps, strict=True):
        end = said[row["key"]]
        rows, columns = map_shape(row["width"], row["height"], grid)
        yield {
            "key": row["key"],
            "video_id": row["video_id"],
            "captions": [text for _, text in end.texts],
            "frames": row["frames"],
            "rows": rows,
            "columns": columns,
            "similarity": similarity,
            "status": str(end.status),
            "policy": bad_input.action(end.status),
            "detail": end.detail,
        }


def _embed_captions(
    scorer: PatchScorer, kept: Sequence[Row], said: Mapping[str, ClipCaptions]
) -> dict[str, np.ndarray]:
    """float32 [D] of each different caption of the shard."""
    different = list(dict.fromkeys(text for row in kept for _, text in said[row["key"]].texts))
    return dict(zip(different, scorer.embed_texts(different), strict=True)) if different else {}


def _stored_map(journal: Journal, key: str) -> np.ndarray | None:
    data = journal.get(key)
    return None if data is None else np.frombuffer(data, np.float16)


def _score_stored(
    embeddings: Path,
    kept: Sequence[Row],
    worded: Mapping[str, Sequence[str]],
    score: Callable[[Row, np.ndarray], np.ndarray],
) -> Iterator[np.ndarray | None]:
    with Progress(f"similarity {embeddings.stem}", len(kept), "clips") as progress:
        stored = stream_rows(embeddings, ("embeddings",), 1, EMBEDDINGS_SCHEMA)
        for row in kept:
            found = _stored_embeddings(embeddings, row, next(stored, None))
            yield score(row, found) if worded[row["key"]] else None
            progress.advance()


def _stored_embeddings(path: Path, row: Row, found: Row | None) -> np.ndarray:
    """A clip's embeddings [T, R, C, D] from its row of their table."""
    if found is None or found["key"] != row["key"]:
        raise DamagedError(f"{path}: clip {row['video_id']!r} is not in its place; remove the file and run again")
    shape, flat = tuple(found[name] for name in ("frames", "rows", "columns", "width")), found["embeddings"]
    if min(shape) < 1 or math.prod(shape) != flat.size or found["frames"] != row["frames"]:
        raise DamagedError(
            f"{path}: clip {row['video_id']!r} has {flat.size} values where {list(shape)} is said; remove the file and "
            "run again"
        )
    return flat.reshape(shape)


def _check_captions(kept: Sequence[Row], said: Mapping[str, ClipCaptions], captions: Path) -> None:
    missing = [row["video_id"] for row in kept if row["key"] not in said]
    if missing:
        raise DamagedError(
            f"{captions}: has nothing on {len(missing)} kept clips, {missing[0]!r} for instance: it was made from other "
            "frames. Remove it and run the captions stage again"
        )
    check_spoken(captions, said)


def _check_embeddings(path: Path, wanted: Mapping[str, Any]) -> None:
    """Refuses embeddings of other frames, another model or another grid."""
    has = read_receipt(path)
    wrong = [key for key in ("model", "grid", "frames") if has.get(key) != wanted[key]]
    if has.get("settings", {}).get("precision") != wanted["settings"]["precision"]:
        wrong.append("precision")
    if wrong:
        raise DamagedError(f"{path}: was made with another {', '.join(wrong)}; remove it and run again")
