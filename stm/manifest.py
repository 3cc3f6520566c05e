"""The manifest of a dataset: its clips, the rejected clips with reasons, and the assignment of clips to shards."""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from stm.jobs.status import Policy, Status
from stm.storage.files import read_json, write_bytes, write_json
from stm.storage.machine_errors import is_machine_error, name_file
from stm.storage.receipts import make_receipt
from stm.storage.tables import REMOVE, DamagedError, read_table, serialize_table


class Question(NamedTuple):
    """A question about a clip, with its answer."""

    question: str  # empty if there are only choices
    answer: str  # one of the choices, if there are any
    choices: tuple[str, ...] = ()  # options of a multiple-choice question; empty if open-ended


QUESTIONS = pa.list_(
    pa.struct([("question", pa.string()), ("answer", pa.string()), ("choices", pa.list_(pa.string()))])
)


def read_questions(values: Iterable[Mapping[str, Any]] | None) -> tuple[Question, ...]:
    """Parse a value of a QUESTIONS column; older tables do not have `choices`."""
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
        pa.field("width", pa.int32()),  # pixels, as shown: cropped, square, rotated
        pa.field("height", pa.int32()),
        pa.field("codec", pa.string()),
        pa.field("frames", pa.int64()),  # estimate reported by the container; null if it reports none
        pa.field("duration", pa.float64()),  # seconds, as reported by the container
        pa.field("bytes", pa.int64()),
        pa.field("sha256", pa.string()),  # of the file
        pa.field("ends_hash", pa.string()),  # see `hash_ends`; tables of older versions do not have this column
    ]
)

QUARANTINE_SCHEMA = pa.schema(
    [
        pa.field("stage", pa.string(), nullable=False),
        pa.field("video_id", pa.string(), nullable=False),
        pa.field("path", pa.string()),
        pa.field("status", pa.string(), nullable=False),
        pa.field("policy", pa.string(), nullable=False),
        pa.field("detail", pa.string()),  # human-readable reason
    ]
)

# Keys and shard names are used in file names, so their characters are restricted.
_PLAIN = re.compile(r"[A-Za-z0-9_-]{1,64}")
# Snakemake, which uses it as a constraint of the wildcard, does not know `{5,}`.
SHARD_PATTERN = r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}-\d{5}\d*"
"""The regular expression of a shard's name; at least five digits, see `name_shard`."""


def make_key(video_id: str) -> str:
    """Return the name of a clip in tars and tables: at most 64 letters, digits, `_` and `-`.

    Keys contain no dots, because WebDataset splits member names at the first dot. An id that already meets these rules
    is used unchanged; any other id becomes a slug with a hash, so that keys stay unique.
    """
    if _PLAIN.fullmatch(video_id):
        return video_id
    slug = re.sub(r"[^A-Za-z0-9_-]+", "_", video_id).strip("_")[-48:].strip("_")
    return f"{slug}-{hashlib.sha256(video_id.encode()).hexdigest()[:12]}".lstrip("-")


def assign_shard(video_id: str, shards: int) -> int:
    """Return the shard index of a clip, 0 to `shards` - 1, by linear hashing of its id.

    The shard depends only on the id and the number of shards. When that number grows by one, clips move out of only one
    shard. Adding a video therefore changes one shard, or a few if a shard is added; finished work on all others stays valid.
    """
    value = int.from_bytes(hashlib.sha256(video_id.encode()).digest()[:8], "big")
    level = 1 << (shards.bit_length() - 1)
    bucket = value % (2 * level)
    return bucket if bucket < shards else bucket - level


def name_shard(split: str, index: int) -> str:
    """Return a shard's name, for example `train-00012` for the split `train` and index 12.

    From index 100,000 on, names have more digits; `order_shards` sorts them all the same.
    """
    return f"{split}-{index:05d}"


def order_shards(shards: Iterable[str]) -> list[str]:
    """Sort shard names by split and index: `train-99999` before `train-100000`, unlike in the order of the alphabet."""
    return sorted(shards, key=_split_and_index)


def _split_and_index(shard: str) -> tuple[str, int]:
    split, _, index = shard.rpartition("-")
    return split, int(index)


def split_of(shard: str) -> str:
    """Return the split from a shard's name, for example `train` from `train-00012`."""
    return shard.rpartition("-")[0]


_END_BYTES = 64 * 1024


def hash_ends(path: Path) -> str:
    """Return a hash of a file's size and of its first and last 64 KiB: 16 hexadecimal digits.

    It takes two short reads, whatever the size, so that each stage that opens a video can check that it is still the one
    that the manifest describes. Headers and indices are at a file's ends: a replaced or re-encoded video changes them.

    Raises:
        OSError: the file cannot be read.
    """
    try:
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            digest = hashlib.sha256(f"{size}\0".encode() + file.read(_END_BYTES))
            file.seek(max(0, size - _END_BYTES))
            digest.update(file.read(_END_BYTES))
    except OSError as error:
        raise name_file(error, path) from error
    return digest.hexdigest()[:16]


class ChangedVideoError(OSError):
    """A video is no longer the one that the manifest describes; results of both must not be mixed."""


def check_unchanged(path: Path, row: Mapping[str, Any]) -> None:
    """Check that a video is still the one of its row in the manifest; without an `ends_hash`, nothing is known of it.

    A missing or unreadable file passes: opening it gives the clip its status.

    Raises:
        ChangedVideoError: the video has been replaced; the message names it, and what to do.
        OSError: the machine cannot read the file.
    """
    expected = row.get("ends_hash")
    if expected is None:
        return
    try:
        found = hash_ends(path)
    except OSError as error:
        if is_machine_error(error):
            raise
        return
    if found != expected:
        size = "" if row.get("bytes") is None else f" of {row['bytes']:,} bytes"
        raise ChangedVideoError(
            f"{path} (clip {row['video_id']!r:.100}) is not the video{size} that the manifest describes: it was replaced "
            "after the manifest was made. Make the manifest again (remove manifest.parquet, or run `stm manifest` and "
            "`stm split`), so that all stages use the same video"
        )


def write_slices(manifest: Path, folder: Path, index: Path, shard_size: int) -> list[str]:
    """Split a manifest into one slice per shard, `folder/{shard}.parquet`, and write an index of all shards.

    Rows are sorted by key. A slice whose content is unchanged is not rewritten, so that nothing downstream of it reruns;
    slices of shards that no longer exist are removed. Returns the names of the shards, see `order_shards`.

    Raises:
        DamagedError: the manifest is damaged or contains duplicate clips; nothing is written in this case.
    """
    table = _read_clips(manifest)
    splits, keys = table.column("split").to_pylist(), table.column("key").to_pylist()
    check_keys(manifest, keys)
    _check_splits(manifest, splits)
    totals = Counter(splits)
    rows_by_shard: dict[str, list[int]] = {}
    for row, (video_id, split) in enumerate(zip(table.column("video_id").to_pylist(), splits, strict=True)):
        shards = -(-totals[split] // shard_size)  # rounded up
        rows_by_shard.setdefault(name_shard(split, assign_shard(video_id, shards)), []).append(row)
    names = order_shards(rows_by_shard)
    # Sorted once, because taking the rows of each shard from the whole table would go through all of it each time; and one
    # column after the other, so that only one is in memory twice.
    order = pa.array([r for name in names for r in sorted(rows_by_shard[name], key=keys.__getitem__)], pa.int64())
    schema, columns = table.schema, []
    while table.num_columns:
        columns.append(table.column(0).take(order))
        table = table.remove_column(0)
    table = pa.Table.from_arrays(columns, schema=schema)
    folder.mkdir(parents=True, exist_ok=True)
    entries = {}
    start = 0
    for name in names:
        clips = len(rows_by_shard[name])
        _write_if_changed(folder / f"{name}.parquet", table.slice(start, clips))
        entries[name] = {"clips": clips, "split": split_of(name)}
        start += clips
    for stale in folder.glob("*.parquet"):
        if stale.stem not in entries:
            stale.unlink()
    write_json(index, {"shards": entries, "receipt": make_receipt("split", {"shard_size": shard_size})})
    return list(entries)


def _write_if_changed(path: Path, table: pa.Table) -> None:
    # Compare bytes and skip unchanged files, so that they keep their modification time, which Snakemake checks.
    data = serialize_table(table, {"stage": "split"})
    if not path.exists() or path.read_bytes() != data:
        write_bytes(path, data)


def read_shards(index: Path) -> list[str]:
    """Read the shard names, see `order_shards`, from the index written by `write_slices`.

    Raises:
        DamagedError: the index is damaged or contains an invalid shard name.
    """
    try:
        shards = list(read_json(index)["shards"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        if is_machine_error(error):
            raise
        raise DamagedError(
            f"{index}: is not a list of shards ({type(error).__name__}: {error}); remove it and run `split` again"
        ) from error
    invalid = [shard for shard in shards if not (isinstance(shard, str) and re.fullmatch(SHARD_PATTERN, shard))]
    if invalid:
        raise DamagedError(f"{index}: {invalid[0]!r} is not a valid shard name; remove the file and run `split` again")
    return order_shards(shards)


def read_slice(path: Path) -> list[dict[str, Any]]:
    """Read the clips of one shard, as written by `write_slices`.

    Raises:
        DamagedError: the file is missing, damaged or contains duplicate clips.
    """
    try:
        return read_rows(path)
    except DamagedError as error:
        # No rule declares a single slice as its output: Snakemake makes them all again, and changes only damaged ones.
        index = path.parent.with_suffix(".json")
        raise DamagedError(error.problem, f"remove {index}, the list of the shards, and run again") from error


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read a manifest, or a slice of it, as a list of rows.

    Raises:
        DamagedError: the file is damaged or contains duplicate clips.
    """
    rows: list[dict[str, Any]] = _read_clips(path).to_pylist()
    check_keys(path, [row["key"] for row in rows])
    return rows


def _read_clips(path: Path) -> pa.Table:
    """A slice or a manifest; one of an older version lacks the columns that were added since."""
    try:
        names = set(pq.read_schema(path).names)
    except (OSError, pa.ArrowException):
        names = set()  # `read_table` raises the error
    added = {"ends_hash"} - names
    table = read_table(path, schema=pa.schema([field for field in MANIFEST_SCHEMA if field.name not in added]))
    if not added:
        _check_ends_hashes(path, table)
    return table


def _check_ends_hashes(path: Path, table: pa.Table) -> None:
    """Reject values that `hash_ends` cannot return: a damaged table must not be taken for a replaced video."""
    valid = pc.match_substring_regex(table.column("ends_hash"), r"^[0-9a-f]{16}$")
    row = pc.index(pc.fill_null(valid, True), False).as_py()
    if row >= 0:
        raise DamagedError(f"{path}: row {row}: its `ends_hash` is not a hash", REMOVE)


def check_keys(path: Path, keys: Sequence[str]) -> None:
    """Reject duplicate keys and keys that `make_key` cannot return, because keys are used in file names.

    Raises:
        DamagedError: reports the file and the first invalid row.
    """
    earlier: set[str] = set()
    for row, key in enumerate(keys):
        if not _PLAIN.fullmatch(key) or key in earlier:
            problem = "occurs twice" if key in earlier else "is not a valid clip key"
            raise DamagedError(f"{path}: row {row}: {key!r:.100} {problem}", REMOVE)
        earlier.add(key)


def _check_splits(path: Path, splits: Sequence[str]) -> None:
    """Reject invalid split names, because they are also used in file names."""
    for row, split in enumerate(splits):
        if not re.fullmatch(SHARD_PATTERN, name_shard(split, 0)):
            raise DamagedError(
                f"{path}: row {row}: {split!r:.100} is not a valid split name; remove the file and run again"
            )


def read_status(path: Path, row: Mapping[str, Any]) -> Status:
    """Return the status in a row of a stage's table.

    Raises:
        DamagedError: the status is unknown.
    """
    try:
        return Status(row["status"])
    except ValueError:
        raise DamagedError(
            f"{path}: clip {row['video_id']!r:.100} has the unknown status {row['status']!r:.100}; remove the file and "
            "run again"
        ) from None


def quarantine_row(
    stage: str, row: Mapping[str, Any], status: Status, policy: Policy, detail: str
) -> dict[str, str | None]:
    """Return a row of QUARANTINE_SCHEMA; `row` may be an annotation without an id."""
    return {
        "stage": stage,
        "video_id": str(row.get("video_id") or row.get("path") or "?"),
        "path": row.get("path"),
        "status": str(status),
        "policy": policy,
        "detail": detail,
    }


class TooManyFailures(RuntimeError):
    """A shard has more dropped clips than the config allows, or a clip whose status has the policy `fail`."""


def check_failures(stage: str, outcomes: Iterable[tuple[str, Status, Policy, str]], max_failure_rate: float) -> None:
    """Stop a stage if too many clips of a shard failed.

    Args:
        outcomes: (video id, status, policy, detail) of every clip of the shard.
        max_failure_rate: the maximum accepted fraction of dropped clips.

    Raises:
        TooManyFailures: reports the first ten clips and, if too many were dropped, their number.
    """
    rows = list(outcomes)
    fatal = [row for row in rows if row[2] == "fail" and row[1] != Status.OK]
    dropped = [row for row in rows if row[2] == "drop"]
    if fatal:
        _raise(stage, "has clips whose policy is `fail`", fatal)
    # In a small shard, a few bad clips are a large fraction, but this does not mean that the stage is broken.
    if len(rows) >= 8 and len(dropped) > max_failure_rate * len(rows):
        _raise(
            stage,
            f"dropped {len(dropped)} of {len(rows)} clips (bad_input.max_failure_rate: {max_failure_rate})",
            dropped,
        )


def _raise(stage: str, problem: str, rows: list[tuple[str, Status, Policy, str]]) -> None:
    first = "\n".join(f"  {video_id}: {status}: {detail}" for video_id, status, _, detail in rows[:10])
    raise TooManyFailures(f"{stage} {problem}; the first:\n{first}")
