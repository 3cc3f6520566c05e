"""The table of clips: what is in a dataset, what was refused and why, and how clips are dealt to shards."""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from stm.jobs.status import Policy, Status
from stm.storage.files import read_json, write_bytes, write_json
from stm.storage.tables import DamagedError, read_table, write_table


class Question(NamedTuple):
    """Something asked about a clip."""

    question: str  # empty where only the choices are asked about
    answer: str  # with choices: one of them
    choices: tuple[str, ...] = ()  # what a multiple choice offers; none: the answer is open


QUESTIONS = pa.list_(
    pa.struct([("question", pa.string()), ("answer", pa.string()), ("choices", pa.list_(pa.string()))])
)


def read_questions(values: Iterable[Mapping[str, Any]] | None) -> tuple[Question, ...]:
    """A value of a column of the type QUESTIONS; `choices` came later and may be missing."""
    return tuple(Question(v["question"], v["answer"], tuple(v.get("choices") or ())) for v in values or ())


MANIFEST_SCHEMA = pa.schema(
    [
        pa.field("video_id", pa.string(), nullable=False),
        pa.field("key", pa.string(), nullable=False),  # the clip's name in every tar and table; see `make_key`
        pa.field("path", pa.string(), nullable=False),  # relative to the dataset's root
        pa.field("start", pa.float64()),  # seconds; null: from the beginning
        pa.field("end", pa.float64()),  # seconds; null: to the end
        pa.field("split", pa.string(), nullable=False),
        pa.field("label", pa.string()),
        pa.field("captions", pa.list_(pa.string())),
        pa.field("questions", QUESTIONS),
        pa.field("fps", pa.float64()),
        pa.field("width", pa.int32()),  # pixels, as shown (rotation applied)
        pa.field("height", pa.int32()),
        pa.field("codec", pa.string()),
        pa.field("frames", pa.int64()),  # the container's word, an estimate; null when it says none
        pa.field("duration", pa.float64()),  # seconds, likewise
        pa.field("bytes", pa.int64()),
        pa.field("sha256", pa.string()),  # of the file
    ]
)

QUARANTINE_SCHEMA = pa.schema(
    [
        pa.field("stage", pa.string(), nullable=False),
        pa.field("video_id", pa.string(), nullable=False),
        pa.field("path", pa.string()),
        pa.field("status", pa.string(), nullable=False),
        pa.field("policy", pa.string(), nullable=False),
        pa.field("detail", pa.string()),  # what was wrong, for people
    ]
)

_PLAIN = re.compile(r"[A-Za-z0-9_-]{1,64}")
_SHARD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}-\d{5,}")


def make_key(video_id: str) -> str:
    """The name of a clip in tars and tables: plain characters, no dot (WebDataset splits names at the first), at most 64.

    Ids that are plain already are their own key; others are slugged and carry a hash, so that keys stay unique.
    """
    if _PLAIN.fullmatch(video_id):
        return video_id
    slug = re.sub(r"[^A-Za-z0-9_-]+", "_", video_id).strip("_")[-48:].strip("_")
    return f"{slug}-{hashlib.sha256(video_id.encode()).hexdigest()[:12]}".lstrip("-")


def assign_shard(video_id: str, shards: int) -> int:
    """The shard, from 0 to `shards` - 1, of a clip: linear hashing of its id.

    Depends on nothing but the id and the number of shards, and when the number grows by one, clips of a single shard
    move. So adding a video changes one shard, or, at a boundary, two: finished work on all others stays valid.
    """
    value = int.from_bytes(hashlib.sha256(video_id.encode()).digest()[:8], "big")
    level = 1 << (shards.bit_length() - 1)
    bucket = value % (2 * level)
    return bucket if bucket < shards else bucket - level


def name_shard(split: str, index: int) -> str:
    return f"{split}-{index:05d}"


def split_of(shard: str) -> str:
    """`train-00012` -> `train`."""
    return shard.rpartition("-")[0]


def write_slices(manifest: Path, folder: Path, index: Path, shard_size: int) -> list[str]:
    """Deals the clips of a manifest to shards: `folder/{shard}.parquet`, sorted by key, and an index of them all.

    A slice whose content stays the same is not written again, so that nothing downstream of it is rerun; slices that
    no longer exist are removed. Returns the shards' names, sorted.

    Raises:
        DamagedError: the manifest is torn, changed, or has a clip twice; nothing is written then.
    """
    table = read_table(manifest, schema=MANIFEST_SCHEMA)
    dealt: dict[str, list[int]] = {}
    splits = table.column("split").to_pylist()
    check_keys(manifest, table.column("key").to_pylist())
    _check_splits(manifest, splits)
    totals = {split: splits.count(split) for split in set(splits)}
    for row, (video_id, split) in enumerate(zip(table.column("video_id").to_pylist(), splits, strict=True)):
        shards = -(-totals[split] // shard_size)
        dealt.setdefault(name_shard(split, assign_shard(video_id, shards)), []).append(row)
    folder.mkdir(parents=True, exist_ok=True)
    entries = {}
    for shard, rows in sorted(dealt.items()):
        part = table.take(rows).sort_by("key")
        sink = folder / f"{shard}.parquet"
        _write_if_changed(sink, part)
        entries[shard] = {"clips": len(rows), "split": split_of(shard)}
    for stale in folder.glob("*.parquet"):
        if stale.stem not in entries:
            stale.unlink()
    write_json(index, {"shards": entries})
    return sorted(entries)


def _write_if_changed(path: Path, table: pa.Table) -> None:
    temporary = path.with_name(f".{path.name}.new")
    write_table(temporary, table, {"stage": "split"})
    data = temporary.read_bytes()
    temporary.unlink()
    if not path.exists() or path.read_bytes() != data:
        write_bytes(path, data)


def read_shards(index: Path) -> list[str]:
    """The shards' names from the index that `write_slices` wrote.

    Raises:
        DamagedError: it is torn, or names what no shard is called.
    """
    try:
        shards = list(read_json(index)["shards"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedError(
            f"{index}: is no list of shards ({type(error).__name__}: {error}); run `split` again"
        ) from error
    odd = [shard for shard in shards if not (isinstance(shard, str) and _SHARD.fullmatch(shard))]
    if odd:
        raise DamagedError(f"{index}: {odd[0]!r} is no shard's name; remove the file and run `split` again")
    return sorted(shards)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """A slice or manifest as a list of rows.

    Raises:
        DamagedError: it is torn or changed, or has a clip twice.
    """
    rows: list[dict[str, Any]] = read_table(path, schema=MANIFEST_SCHEMA).to_pylist()
    check_keys(path, [row["key"] for row in rows])
    return rows


def check_keys(path: Path, keys: Sequence[str]) -> None:
    """Refuses keys that occur twice, or that `make_key` would not make: they become names of files.

    Raises:
        DamagedError: with the file and the first such row.
    """
    seen: set[str] = set()
    for row, key in enumerate(keys):
        if not _PLAIN.fullmatch(key) or key in seen:
            what = "occurs twice" if key in seen else "is no clip's key"
            raise DamagedError(f"{path}: row {row}: {key!r:.100} {what}; remove the file and run again")
        seen.add(key)


def _check_splits(path: Path, splits: Sequence[str]) -> None:
    """Splits become names of files, too."""
    for row, split in enumerate(splits):
        if not _SHARD.fullmatch(name_shard(split, 0)):
            raise DamagedError(f"{path}: row {row}: {split!r:.100} is no split's name; remove the file and run again")


def read_status(path: Path, row: Mapping[str, Any]) -> Status:
    """The status in a row of a stage's table.

    Raises:
        DamagedError: there is no such status.
    """
    try:
        return Status(row["status"])
    except ValueError:
        raise DamagedError(
            f"{path}: clip {row['video_id']!r:.100} has the status {row['status']!r:.100}, which is none; remove the file "
            "and run again"
        ) from None


def quarantine_row(
    stage: str, row: Mapping[str, Any], status: Status, policy: Policy, detail: str
) -> dict[str, str | None]:
    return {
        "stage": stage,
        "video_id": str(row.get("video_id") or row.get("path") or "?"),
        "path": row.get("path"),
        "status": str(status),
        "policy": policy,
        "detail": detail,
    }


class TooManyFailures(RuntimeError):
    """More clips of a shard were dropped than the config allows, or one whose status has the policy `fail`."""


def check_failures(stage: str, outcomes: Iterable[tuple[str, Status, Policy, str]], max_failure_rate: float) -> None:
    """Stops a stage whose shard went wrong as a whole.

    Args:
        outcomes: (video id, status, policy, detail) of every clip of the shard.

    Raises:
        TooManyFailures: with counts per status and the first clips.
    """
    rows = list(outcomes)
    fatal = [r for r in rows if r[2] == "fail" and r[1] != Status.OK]
    dropped = [r for r in rows if r[2] == "drop"]
    if fatal:
        _raise(stage, "has clips whose policy is `fail`", fatal)
    if len(rows) >= 8 and len(dropped) > max_failure_rate * len(rows):
        _raise(
            stage,
            f"dropped {len(dropped)} of {len(rows)} clips (bad_input.max_failure_rate: {max_failure_rate})",
            dropped,
        )


def _raise(stage: str, what: str, rows: list[tuple[str, Status, Policy, str]]) -> None:
    first = "\n".join(f"  {video_id}: {status}: {detail}" for video_id, status, _, detail in rows[:10])
    raise TooManyFailures(f"{stage} {what}; the first:\n{first}")
