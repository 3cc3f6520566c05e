"""The similarity stage: CLIP similarity of each patch of each stored frame to each caption (TGM, section 3.3)."""

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
from stm.preprocess.captions.write import check_has_captions, hash_frames, read_captions
from stm.preprocess.frames.table import read_kept
from stm.preprocess.similarity.dense_scorer import DenseScorer
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
        pa.field("embeddings", pa.list_(pa.float16()), nullable=False),  # [T, R, C, D], unit length
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
        pa.field("similarity", pa.list_(pa.float16())),  # [K, T, R, C], cosine; null if the clip has no caption
        pa.field("status", pa.string(), nullable=False),  # as recorded by the captions stage
        pa.field("policy", pa.string(), nullable=False),
        pa.field("detail", pa.string(), nullable=False),
    ]
)
_LIBRARIES = ("torch", "open_clip_torch", "timm", "numpy", "simplejpeg", "pyarrow")
_CLIPS_PER_ROW_GROUP = 16  # for maps; embeddings take megabytes per clip and have one clip per row group

Row = Mapping[str, Any]


def load_scorer(settings: Similarity, grid: int, device: str | None = None) -> PatchScorer:
    """Load the config's CLIP, to embed the cells of frames with the config's method.

    Args:
        grid: cells along the short side of a map.
        device: defaults to CUDA if available.

    Raises:
        ModelError: it cannot be loaded, or the method does not apply to it.
    """
    clip = load_clip(settings.model, settings.precision, device)
    if settings.method == "dense":
        return DenseScorer(clip, grid, settings.batch_size, settings.compile)
    return PatchScorer(clip, grid, settings.batch_size, settings.compile, settings.window)


def write_embeddings(
    frames_tar: Path,
    frames_index: Path,
    output: Path,
    settings: Similarity,
    grid: int,
    device: str | None = None,
) -> None:
    """Embed every patch of every stored frame of a shard's kept clips; the table is large (megabytes per clip).

    Args:
        frames_tar, frames_index: outputs of the frames stage.
        output: table with one row per kept clip; see `EMBEDDINGS_SCHEMA`.
        grid: cells along the short side of a map.
        device: defaults to CUDA if available.

    Raises:
        ModelError: the config's model cannot be loaded.
    """
    kept = read_kept(frames_index)
    scorer = load_scorer(settings, grid, device)
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
    """Score every patch of every stored frame of a shard's kept clips against each caption of its clip.

    Args:
        frames_tar, frames_index: outputs of the frames stage.
        captions: output of the captions stage for one source.
        output: table with one row per kept clip; see `SIMILARITY_SCHEMA`.
        grid: cells along the short side of a map.
        embeddings: output of `write_embeddings` for the same frames, model and grid, used instead of running the image
            tower. The output bytes are the same with and without it (at the same batch size).
        device: defaults to CUDA if available.

    Raises:
        TooManyFailures: more clips lack captions than the config allows; raised after `output` is written.
        ModelError: the config's model cannot be loaded.
        DamagedError: captions or embeddings were made from different frames.
    """
    kept = read_kept(frames_index)
    captions_by_key = read_captions(captions)
    _check_captions(kept, captions_by_key, captions)
    scorer = load_scorer(settings, grid, device)
    vectors = _embed_captions(scorer, kept, captions_by_key)
    texts_by_key = {row["key"]: [text for _, text in captions_by_key[row["key"]].texts] for row in kept}
    receipt = _make_receipt("similarity", settings, scorer, kept) | {"captions": hash_receipt(texts_by_key)}
    journal = Journal(output, receipt)

    def score(row: Row, patches: np.ndarray) -> np.ndarray:
        return cosine(patches, np.stack([vectors[text] for text in texts_by_key[row["key"]]]))

    if embeddings is None:
        without_captions = {key for key, texts in texts_by_key.items() if not texts}
        _fill_journal(scorer, frames_tar, kept, without_captions, journal, "similarity", score)
        maps: Iterable[np.ndarray | None] = (_stored_map(journal, row["key"]) for row in kept)
    else:
        _check_embeddings(embeddings, _make_receipt("embeddings", settings, scorer, kept))
        maps = _score_stored(embeddings, kept, texts_by_key, score)
    rows = _similarity_rows(kept, captions_by_key, maps, grid, bad_input)
    policy = {"policy": bad_input.model_dump(mode="json")["policy"]}
    write_rows(output, SIMILARITY_SCHEMA, rows, receipt | policy, _CLIPS_PER_ROW_GROUP)
    clips = [(row["video_id"], captions_by_key[row["key"]]) for row in kept]
    outcomes = [(video_id, clip.status, bad_input.action(clip.status), clip.detail) for video_id, clip in clips]
    check_failures(f"similarity {output.stem}", outcomes, bad_input.max_failure_rate)
    journal.close()


def _make_receipt(stage: str, settings: Similarity, scorer: PatchScorer, kept: Sequence[Row]) -> dict[str, Any]:
    identity = scorer.clip.identity
    # The fingerprint omits whether embeddings are kept, which does not affect the maps.
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
    """Write the bytes of `make(row, embeddings)` to the journal for clips in neither the journal nor `skipped`."""
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
    captions_by_key: Mapping[str, ClipCaptions],
    maps: Iterable[np.ndarray | None],
    grid: int,
    bad_input: BadInput,
) -> Iterator[dict[str, Any]]:
    for row, similarity in zip(kept, maps, strict=True):
        captions = captions_by_key[row["key"]]
        rows, columns = map_shape(row["width"], row["height"], grid)
        yield {
            "key": row["key"],
            "video_id": row["video_id"],
            "captions": [text for _, text in captions.texts],
            "frames": row["frames"],
            "rows": rows,
            "columns": columns,
            "similarity": similarity,
            "status": str(captions.status),
            "policy": bad_input.action(captions.status),
            "detail": captions.detail,
        }


def _embed_captions(
    scorer: PatchScorer, kept: Sequence[Row], captions_by_key: Mapping[str, ClipCaptions]
) -> dict[str, np.ndarray]:
    """Return the embedding, float32 [D], of each distinct caption in the shard."""
    unique = list(dict.fromkeys(text for row in kept for _, text in captions_by_key[row["key"]].texts))
    return dict(zip(unique, scorer.embed_texts(unique), strict=True)) if unique else {}


def _stored_map(journal: Journal, key: str) -> np.ndarray | None:
    data = journal.get(key)
    return None if data is None else np.frombuffer(data, np.float16)


def _score_stored(
    embeddings: Path,
    kept: Sequence[Row],
    texts_by_key: Mapping[str, Sequence[str]],
    score: Callable[[Row, np.ndarray], np.ndarray],
) -> Iterator[np.ndarray | None]:
    with Progress(f"similarity {embeddings.stem}", len(kept), "clips") as progress:
        stored = stream_rows(embeddings, ("embeddings",), 1, EMBEDDINGS_SCHEMA)
        for row in kept:
            patches = _stored_embeddings(embeddings, row, next(stored, None))
            yield score(row, patches) if texts_by_key[row["key"]] else None
            progress.advance()


def _stored_embeddings(path: Path, row: Row, stored: Row | None) -> np.ndarray:
    """Return a clip's embeddings, float16 [T, R, C, D], from `stored`, its row of the embeddings table."""
    if stored is None or stored["key"] != row["key"]:
        raise DamagedError(f"{path}: no row for clip {row['video_id']!r} in key order; remove the file and run again")
    shape = tuple(stored[name] for name in ("frames", "rows", "columns", "width"))
    flat = stored["embeddings"]
    if min(shape) < 1 or math.prod(shape) != flat.size or stored["frames"] != row["frames"]:
        raise DamagedError(
            f"{path}: clip {row['video_id']!r} has {flat.size} values where its row declares {list(shape)}; remove the "
            "file and run again"
        )
    return flat.reshape(shape)


def _check_captions(kept: Sequence[Row], captions_by_key: Mapping[str, ClipCaptions], path: Path) -> None:
    """Reject a captions table that lacks a kept clip, or in which a clip with status `ok` has no caption."""
    missing = [row["video_id"] for row in kept if row["key"] not in captions_by_key]
    if missing:
        raise DamagedError(
            f"{path}: has no rows for {len(missing)} kept clips, for instance {missing[0]!r}: it was made from "
            "different frames. Remove it and run the captions stage again"
        )
    check_has_captions(path, captions_by_key)


def _check_embeddings(path: Path, expected: Mapping[str, Any]) -> None:
    """Reject embeddings of different frames, or made with a different model, grid, window or precision."""
    receipt = read_receipt(path)
    different = [key for key in ("model", "grid", "frames") if receipt.get(key) != expected[key]]
    made, wanted = receipt.get("settings", {}), expected["settings"]
    different += [key for key in ("precision", "window", "method") if made.get(key) != wanted.get(key)]
    if different:
        raise DamagedError(f"{path}: was made with a different {', '.join(different)}; remove it and run again")
