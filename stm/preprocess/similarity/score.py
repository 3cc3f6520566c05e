"""The similarity stage: CLIP similarity of each patch of each stored frame to each caption (TGM, section 3.3)."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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
JOINT_SCHEMA = pa.schema(
    [
        pa.field("source", pa.string(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("similarity", pa.list_(pa.float16())),  # as in SIMILARITY_SCHEMA
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
        from stm.preprocess.similarity.dense_scorer import DenseScorer

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
    receipt = _make_receipt("embeddings", settings, scorer.clip.identity, grid, kept)
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
    clips = _Captions.read(captions, kept)
    scorer = load_scorer(settings, grid, device)
    clips.embed(scorer)
    identity = scorer.clip.identity
    receipt = _make_receipt("similarity", settings, identity, grid, kept) | {"captions": clips.digest}
    journal = Journal(output, receipt)
    if embeddings is None:
        _fill_journal(scorer, frames_tar, kept, clips.without_captions, journal, "similarity", clips.score)
        maps: Iterable[np.ndarray | None] = (_stored_map(journal, row["key"]) for row in kept)
    else:
        _check_made(embeddings, _make_receipt("embeddings", settings, identity, grid, kept))
        maps = _score_stored(embeddings, kept, clips)
    _write_maps(output, kept, clips, maps, grid, receipt, bad_input)
    journal.close()


def write_joint_similarity(
    frames_tar: Path,
    frames_index: Path,
    captions: Mapping[str, Path],
    output: Path,
    settings: Similarity,
    grid: int,
    device: str | None = None,
) -> None:
    """Score every patch of every stored frame of a shard's kept clips against the captions of all sources, in one pass.

    Args:
        captions: outputs of the captions stage, by source.
        output: table for `take_similarity`, with one row per source and kept clip; see `JOINT_SCHEMA`.

    Other arguments and exceptions as for `write_similarity`.
    """
    kept = read_kept(frames_index)
    sources = {name: _Captions.read(path, kept) for name, path in captions.items()}
    scorer = load_scorer(settings, grid, device)
    for clips in sources.values():
        clips.embed(scorer)
    receipt = _make_receipt("joint_similarity", settings, scorer.clip.identity, grid, kept)
    receipt |= {"captions": {name: clips.digest for name, clips in sources.items()}}
    journal = Journal(output, receipt)

    def score(row: Row, patches: np.ndarray) -> np.ndarray:
        # One product per source: the size of a product can change the last bits of its result.
        captioned = [clips for clips in sources.values() if clips.texts[row["key"]]]
        return np.concatenate([clips.score(row, patches) for clips in captioned])

    without_captions = set.intersection(*(clips.without_captions for clips in sources.values())) if sources else set()
    _fill_journal(scorer, frames_tar, kept, without_captions, journal, "joint_similarity", score)
    write_rows(output, JOINT_SCHEMA, _joint_rows(kept, sources, journal), receipt, _CLIPS_PER_ROW_GROUP)
    journal.close()


def take_similarity(
    joint: Path,
    source: str,
    frames_index: Path,
    captions: Path,
    output: Path,
    settings: Similarity,
    grid: int,
    bad_input: BadInput,
) -> None:
    """Write the maps of one caption source, with the bytes of `write_similarity`, from those of all sources.

    Args:
        joint: output of `write_joint_similarity` for the same frames, captions, model and grid.

    Other arguments as for `write_similarity`.

    Raises:
        TooManyFailures: more clips lack captions than the config allows; raised after `output` is written.
        DamagedError: captions or maps were made from different files.
    """
    kept = read_kept(frames_index)
    clips = _Captions.read(captions, kept)
    made = read_receipt(joint)
    identity = made.get("model") or {"model": settings.model}
    expected = _make_receipt("joint_similarity", settings, identity, grid, kept)
    _check_made(joint, expected)
    if made["captions"].get(source) != clips.digest:
        raise DamagedError(f"{joint}: was made with different captions than {captions}; remove it and run again")
    receipt = _make_receipt("similarity", settings, identity, grid, kept) | {"captions": clips.digest}
    _write_maps(output, kept, clips, _take_maps(joint, source, kept), grid, receipt, bad_input)


@dataclass
class _Captions:
    """The captions of a shard's kept clips from one source, and their embeddings."""

    by_key: Mapping[str, ClipCaptions]
    texts: Mapping[str, list[str]]  # by key
    vectors: Mapping[str, np.ndarray] = field(default_factory=dict)  # by text, float32 [D]

    @classmethod
    def read(cls, path: Path, kept: Sequence[Row]) -> "_Captions":
        """Read a captions table, and reject one that lacks a kept clip."""
        by_key = read_captions(path)
        _check_captions(kept, by_key, path)
        return cls(by_key, {row["key"]: [text for _, text in by_key[row["key"]].texts] for row in kept})

    def embed(self, scorer: PatchScorer) -> None:
        """Embed each distinct caption once."""
        unique = list(dict.fromkeys(text for texts in self.texts.values() for text in texts))
        self.vectors = dict(zip(unique, scorer.embed_texts(unique), strict=True)) if unique else {}

    @property
    def digest(self) -> str:
        """The hash of the captions, for receipts."""
        return hash_receipt(dict(self.texts))

    @property
    def without_captions(self) -> set[str]:
        """The keys of the clips without captions."""
        return {key for key, texts in self.texts.items() if not texts}

    def score(self, row: Row, patches: np.ndarray) -> np.ndarray:
        """Return the maps of a clip that has captions, float16 [K, T, R, C]."""
        return cosine(patches, np.stack([self.vectors[text] for text in self.texts[row["key"]]]))


def _make_receipt(
    stage: str, settings: Similarity, identity: Mapping[str, str], grid: int, kept: Sequence[Row]
) -> dict[str, Any]:
    # The fingerprint omits whether embeddings are kept, which does not affect the maps.
    used = settings.fingerprint() | {"model": identity["model"]}
    return make_receipt(stage, used, _LIBRARIES, model=dict(identity), grid=grid, frames=hash_frames(kept))


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


def _write_maps(
    output: Path,
    kept: Sequence[Row],
    clips: _Captions,
    maps: Iterable[np.ndarray | None],
    grid: int,
    receipt: Mapping[str, Any],
    bad_input: BadInput,
) -> None:
    """Write the table of one source, and check how many clips lack captions."""
    policy = {"policy": bad_input.model_dump(mode="json")["policy"]}
    rows = _similarity_rows(kept, clips.by_key, maps, grid, bad_input)
    write_rows(output, SIMILARITY_SCHEMA, rows, {**receipt, **policy}, _CLIPS_PER_ROW_GROUP)
    found = [(row["video_id"], clips.by_key[row["key"]]) for row in kept]
    outcomes = [(video_id, clip.status, bad_input.action(clip.status), clip.detail) for video_id, clip in found]
    check_failures(f"similarity {output.stem}", outcomes, bad_input.max_failure_rate)


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


def _joint_rows(kept: Sequence[Row], sources: Mapping[str, _Captions], journal: Journal) -> Iterator[dict[str, Any]]:
    for number, name in enumerate(sources):
        for row in kept:
            key, similarity = row["key"], None
            counts = [len(clips.texts[key]) for clips in sources.values()]
            if counts[number]:
                joint = _stored_map(journal, key)
                assert joint is not None, key
                start = sum(counts[:number])
                similarity = joint.reshape(sum(counts), -1)[start : start + counts[number]].reshape(-1)
            yield {"source": name, "key": key, "similarity": similarity}


def _take_maps(joint: Path, source: str, kept: Sequence[Row]) -> Iterator[np.ndarray | None]:
    rows = stream_rows(joint, ("similarity",), _CLIPS_PER_ROW_GROUP, JOINT_SCHEMA)
    own = (row for row in rows if row["source"] == source)
    for row in kept:
        found = next(own, None)
        if found is None or found["key"] != row["key"]:
            raise DamagedError(
                f"{joint}: no row for clip {row['video_id']!r} in key order; remove the file and run again"
            )
        yield found["similarity"]


def _stored_map(journal: Journal, key: str) -> np.ndarray | None:
    data = journal.get(key)
    return None if data is None else np.frombuffer(data, np.float16)


def _score_stored(
    embeddings: Path,
    kept: Sequence[Row],
    clips: _Captions,
) -> Iterator[np.ndarray | None]:
    with Progress(f"similarity {embeddings.stem}", len(kept), "clips") as progress:
        stored = stream_rows(embeddings, ("embeddings",), 1, EMBEDDINGS_SCHEMA)
        for row in kept:
            patches = _stored_embeddings(embeddings, row, next(stored, None))
            yield clips.score(row, patches) if clips.texts[row["key"]] else None
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


def _check_made(path: Path, expected: Mapping[str, Any]) -> None:
    """Reject embeddings or maps of different frames, or made with a different model, grid, window or precision."""
    receipt = read_receipt(path)
    different = [key for key in ("model", "grid", "frames") if receipt.get(key) != expected[key]]
    made, wanted = receipt.get("settings", {}), expected["settings"]
    different += [key for key in ("precision", "window", "method") if made.get(key) != wanted.get(key)]
    if different:
        raise DamagedError(f"{path}: was made with a different {', '.join(different)}; remove it and run again")
