"""The shards stage: pack a shard's frames, captions and arrays into one WebDataset tar, with an index of all members.

A sample is `{key}.json`, `{key}.0000.jpg`, ... and one `{key}.{name}.npy` per array (`stm.shards.schema`). The tar is a
pure function of its inputs, so that equal inputs produce equal bytes: it contains no timestamps or owners, and samples
are sorted by key.
"""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from stm.config import BadInput, Pack
from stm.jobs.lock import only_job
from stm.jobs.progress import Progress
from stm.jobs.status import Policy, Status
from stm.manifest import Question, check_failures, read_questions
from stm.preprocess.captions.write import hash_frames
from stm.preprocess.frames.table import read_jpegs, read_kept, rows_of_kept
from stm.preprocess.packing.parts import ClipParts, Inputs, join_parts
from stm.shards.check import ShardError, verify_shard
from stm.shards.checksums import array_checksums, checksum
from stm.shards.grid import map_shape
from stm.shards.schema import ARRAYS, shard_schema
from stm.storage.files import atomic_path, sha256_file
from stm.storage.receipts import make_receipt
from stm.storage.tables import DamagedError, read_receipt, write_table
from stm.storage.tars import Member, TarWriter

__all__ = ["ShardError", "pack_shard", "verify_shard"]

Row = Mapping[str, Any]


def pack_shard(
    slice_path: Path,
    frames_tar: Path,
    frames_index: Path,
    captions: Mapping[str, Path],
    arrays: Mapping[str, Path | Mapping[str, Path] | None],
    tar: Path,
    index: Path,
    pack: Pack,
    grid: int,
    bad_input: BadInput,
) -> None:
    """Pack the kept clips of a shard, with one clip in memory at a time.

    A clip is omitted if the stage that produced a packed part assigned it a status whose policy is `drop`. If the
    policy is `keep`, the clip is packed without that part. With several caption sources, a caption from any one
    of them is enough.

    Args:
        slice_path: the shard's clips (MANIFEST_SCHEMA, sorted by key).
        frames_tar, frames_index: outputs of the frames stage.
        captions: the table of each source in `pack.sources`. A clip's captions from all sources are concatenated in the
            order of `pack.sources`; so are the layers of arrays with one layer per caption.
        arrays: the table of each array in `pack.arrays`, by name; for arrays that depend on captions, one per source.
        tar, index: output files.
        grid: cells along the short side of a map.

    Raises:
        ValueError: the table of a packed part is missing.
        TooManyFailures: more clips are omitted than the config allows.
        DamagedError: the inputs are damaged or do not belong together.
        JobRunningError: another process is packing the same shard.
    """
    with only_job(tar):
        kept = read_kept(frames_index)
        clips = rows_of_kept(slice_path, kept)
        inputs = Inputs(captions, arrays)
        made = _read_receipts(frames_index, inputs, pack)
        parts = join_parts(kept, inputs, pack, grid, bad_input)
        lines: list[dict[str, Any]] = []
        outcomes: list[tuple[str, Status, Policy, str]] = []
        with atomic_path(tar) as temporary:
            with TarWriter(temporary) as writer, Progress(f"shards {tar.stem}", len(kept), "clips") as progress:
                for clip, row, part in zip(clips, kept, parts, strict=True):
                    outcomes.append((row["video_id"], *part.outcome))
                    if part.outcome.policy != "drop":
                        lines.append(_pack_clip(writer, clip, row, part, frames_tar, grid))
                    progress.advance()
            digest = sha256_file(temporary)
        receipt = make_receipt("shards", pack.fingerprint(), ("numpy", "pyarrow"), grid=grid, frames=hash_frames(kept))
        receipt |= {"policy": bad_input.model_dump(mode="json")["policy"], "tar_sha256": digest, "clips": len(lines)}
        receipt |= made
        write_table(index, pa.Table.from_pylist(lines, schema=shard_schema()), receipt)
        check_failures(f"shards {tar.stem}", outcomes, bad_input.max_failure_rate)


def _read_receipts(frames_index: Path, inputs: Inputs, pack: Pack) -> dict[str, Any]:
    """Return what the shard's receipt says of its parts. They may be removed after packing; what made them remains known."""
    made: dict[str, Any] = {"parts": {"frames": read_receipt(frames_index), **inputs.receipts()}}
    made["text_model"] = _text_model([inputs.of_source("text", name) for name in pack.sources] if pack.text else [])
    if pack.similarity:
        made |= _similarity_window([inputs.of_source("similarity", name) for name in pack.sources])
    return made


def _text_model(tables: Sequence[Path]) -> dict[str, str] | None:
    """Return the identity of the encoder of the packed text vectors; evaluation must embed its texts with the same one.

    Raises:
        DamagedError: the sources' tables come from different encoders, whose vectors are not comparable.
    """
    models = [read_receipt(path).get("model") for path in tables]
    if any(model != models[0] for model in models):
        names = " and ".join(str(path) for path in tables)
        raise DamagedError(f"{names} come from different text encoders. Remove them and run the text stage again")
    return models[0] if models else None


def _similarity_window(tables: Sequence[Path]) -> dict[str, int]:
    """Return the window of the packed similarity maps, in cells, for the receipt; empty if patches are single cells.

    Raises:
        DamagedError: the sources' tables were made with different windows.
    """
    windows = {path: read_receipt(path).get("settings", {}).get("window", 1) for path in tables}
    if len(set(windows.values())) > 1:
        made = " and ".join(f"{path} ({window})" for path, window in windows.items())
        raise DamagedError(f"{made} were made with different windows. Remove them and run the similarity stage again")
    window = max(windows.values(), default=1)
    return {"similarity_window": window} if window > 1 else {}


def _pack_clip(writer: TarWriter, clip: Row, row: Row, part: ClipParts, frames_tar: Path, grid: int) -> dict[str, Any]:
    """Add the members of a clip to the tar, and return its row of the index."""
    key = row["key"]
    rows, columns = map_shape(row["width"], row["height"], grid)
    columns_of_clip = {
        "key": key,
        "video_id": row["video_id"],
        "split": clip["split"],
        "label": clip["label"],
        "captions": part.captions,
        "caption_sources": part.sources,
        "width": row["width"],
        "height": row["height"],
        "rows": rows,
        "columns": columns,
        "pts": row["pts"],
    }
    questions = read_questions(clip["questions"])
    metadata = columns_of_clip | {"questions": [_question_json(question) for question in questions]}
    header = writer.add(f"{key}.json", json.dumps(metadata, sort_keys=True, allow_nan=False).encode())
    jpegs: list[Member] = []
    checksums: dict[str, list[int]] = {"crc32": []}
    for number, data in enumerate(read_jpegs(frames_tar, dict(row))):
        # The hash is already verified by `read_jpegs`.
        jpegs.append(writer.add(f"{key}.{number:04d}.jpg", data, row["sha256"][number]))
        checksums["crc32"].append(checksum(data))
    clip_sizes = {"captions": len(part.captions), "frames": len(jpegs), "rows": rows, "columns": columns}
    added: dict[str, Member] = {}
    sizes: dict[str, int] = {}  # no entries for absent arrays: Arrow sets them to null
    for name, values in part.arrays.items():
        sizes |= ARRAYS[name].measure(values, clip_sizes)
        member = _npy_bytes(values)
        added[name] = writer.add(f"{key}.{name}.npy", member)
        checksums[ARRAYS[name].checksum_column] = array_checksums(member, ARRAYS[name], values.shape)
    question_column = {"questions": [question._asdict() for question in questions]}
    return columns_of_clip | question_column | sizes | checksums | _member_columns(header, jpegs, added)


def _question_json(question: Question) -> dict[str, Any]:
    """Return a question for `{key}.json`; `choices` is omitted for open-ended questions."""
    return {name: value for name, value in question._asdict().items() if name != "choices" or value}


def _npy_bytes(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()


def _member_columns(header: Member, jpegs: list[Member], arrays: dict[str, Member]) -> dict[str, Any]:
    """Return index columns of the members' offsets, sizes and hashes; Arrow fills in null for absent arrays."""
    return {
        "frames": len(jpegs),
        "json_offset": header.offset,
        "json_size": header.size,
        "offsets": [member.offset for member in jpegs],
        "sizes": [member.size for member in jpegs],
        **{f"{name}_offset": member.offset for name, member in arrays.items()},
        **{f"{name}_size": member.size for name, member in arrays.items()},
        "sha256": [member.sha256 for member in (header, *jpegs, *arrays.values())],
    }
