"""Builds the manifest of a dataset: its clips, their metadata, and the refused clips with the reasons."""

import hashlib
import json
import logging
import os
import stat
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from stm.config import BenchmarkDataset, Config, Dataset, FolderDataset, LanguageDataset, MovingShapesDataset
from stm.datasets import actions, video_text
from stm.datasets.actions import check_benchmark, read_benchmark
from stm.datasets.annotations import AnnotationError, read_annotations
from stm.datasets.copies import DatasetCopy
from stm.datasets.file_lookup import FileLookup
from stm.datasets.folder import DatasetError, NamedClip, Refused, list_clips, row_of, walk_videos
from stm.datasets.probe_pool import Facts, probe_files
from stm.datasets.video_text import check_language, has_images, is_corpus, protocol_settings, read_language
from stm.jobs.journal import Journal
from stm.jobs.progress import Progress
from stm.jobs.status import Policy, Status
from stm.manifest import MANIFEST_SCHEMA, QUARANTINE_SCHEMA, check_failures, quarantine_row
from stm.storage.files import sha256_file
from stm.storage.machine_errors import is_machine_error
from stm.storage.receipts import make_receipt
from stm.storage.tables import write_table

_log = logging.getLogger(__name__)

__all__ = ["DatasetError", "build_manifest", "check_copy", "list_fingerprint", "official_clips"]

# Clips that never enter the manifest, whatever the policy: their file is missing or ambiguous.
_UNUSABLE = {Status.BAD_ROW, Status.DUPLICATE_ID, Status.PATH_OUTSIDE_ROOT, Status.MISSING_FILE}


def build_manifest(config: Config, generated: Path | None, manifest: Path, quarantine: Path, processes: int) -> None:
    """Writes the table of clips and the table of refused clips.

    Args:
        generated: folder of the generated dataset; only for `moving-shapes`.
        manifest: output file (MANIFEST_SCHEMA), sorted by video_id.
        quarantine: output file (QUARANTINE_SCHEMA).
        processes: number of processes that open files.

    Raises:
        DatasetError, AnnotationError: the dataset, its annotations or all of its clips are unusable, or the copy of a
            benchmark is not the official one (see `stm.datasets.actions.check_benchmark` and
            `stm.datasets.video_text.check_language`).
        TooManyFailures: more clips were refused than `bad_input.max_failure_rate` allows, or a clip was refused whose
            policy is `fail`. Both tables have been written by then.
    """
    root, clips, refused = _list(config, generated)
    receipt = _receipt(config)
    # File metadata do not depend on the policies, so a run with different policies resumes from the same journal.
    journal = Journal(manifest, make_receipt("probe", _limits(config), ("av",)))
    facts = _probe(config, root, clips, journal, processes)
    kept, outcomes, quarantined = [], [], []
    for clip in clips:
        fact = facts[clip.clip.path]
        status, detail = Status(fact["status"]), str(fact["detail"])
        policy: Policy = config.bad_input.action(status)
        outcomes.append((clip.video_id, status, policy, detail))
        if policy == "keep":
            kept.append(clip)
        if status is not Status.OK:
            quarantined.append(quarantine_row("manifest", row_of(clip, fact), status, policy, detail))
    for refusal in refused:
        policy = _policy_of_refused(config, refusal.status)
        # Missing files are expected in a partial copy: they are quarantined but not counted as failures.
        if not (_may_miss(config) and refusal.status is Status.MISSING_FILE and policy != "fail"):
            outcomes.append((refusal.video_id, refusal.status, policy, refusal.detail))
        values = {"video_id": refusal.video_id, "path": refusal.path}
        quarantined.append(quarantine_row("manifest", values, refusal.status, policy, refusal.detail))
    # The bytes of a table must not depend on the order of the annotations or of directory listings.
    kept.sort(key=lambda clip: (clip.video_id, clip.clip.path))
    quarantined.sort(key=lambda row: (row["video_id"], row["path"] or "", row["detail"] or ""))
    _write(manifest, (row_of(clip, facts[clip.clip.path]) for clip in kept), MANIFEST_SCHEMA, receipt)
    _write(quarantine, iter(quarantined), QUARANTINE_SCHEMA, receipt)
    check_failures("manifest", outcomes, config.bad_input.max_failure_rate)
    if not kept:
        first = "\n".join(f"  {video_id}: {status}: {detail}" for video_id, status, _, detail in outcomes[:10])
        raise DatasetError(f"dataset.root: none of the clips in {root} can be used; the first:\n{first}")
    journal.close()


def read_copy(config: Config) -> DatasetCopy | None:
    """Reads the lists of a public dataset and searches for its files; None for other datasets.

    Raises:
        DatasetError: see `read_language` and `read_benchmark`.
    """
    if isinstance(config.dataset, LanguageDataset):
        return read_language(config.dataset)
    return read_benchmark(config.dataset) if isinstance(config.dataset, BenchmarkDataset) else None


def check_copy(config: Config, copy: DatasetCopy | None = None) -> None:
    """Runs the check of `build_manifest` that a benchmark's copy is official and complete, without opening a video.

    Args:
        copy: from `read_copy`; by default it is read here.

    Raises:
        DatasetError: the copy is not official or not complete; the message contains the counts and the remedy.
    """
    dataset = config.dataset
    if isinstance(dataset, FolderDataset) and not Path(dataset.root).is_dir():
        raise DatasetError(f"dataset.root {dataset.root!r}: no such folder")
    if isinstance(dataset, LanguageDataset):
        check_language(dataset, copy)
    elif isinstance(dataset, BenchmarkDataset):
        check_benchmark(dataset, copy)


def official_clips(dataset: Dataset) -> dict[str, int]:
    """Clips per split of a complete copy of a public dataset; for a corpus, about as many as were published; else empty."""
    if isinstance(dataset, BenchmarkDataset):
        return actions.official_counts(dataset.source, dataset.fold)
    return video_text.official_counts(dataset.source) if isinstance(dataset, LanguageDataset) else {}


def _dataset(config: Config) -> Dataset:
    """The dataset of a single-dataset config."""
    if config.dataset is None:
        raise DatasetError(
            f"the config has several datasets ({', '.join(config.datasets)}); a manifest is made from one of them"
        )
    return config.dataset


def _list(config: Config, generated: Path | None) -> tuple[Path, list[NamedClip], list[Refused]]:
    dataset = _dataset(config)
    if isinstance(dataset, FolderDataset):
        root, annotations = Path(dataset.root), None if dataset.annotations is None else Path(dataset.annotations)
        listing = list_clips(root, annotations, dataset.extensions, dataset.split)
        for note in listing.notes:
            _log.warning(f"{annotations or root}: {note}")
        return root, listing.clips, listing.refused
    if isinstance(dataset, BenchmarkDataset):
        benchmark = read_benchmark(dataset)
        _log.info(check_benchmark(dataset, benchmark).describe())
        return Path(dataset.root), benchmark.clips, benchmark.refused
    if isinstance(dataset, LanguageDataset):
        return _list_language(config, dataset)
    if generated is None:
        raise DatasetError(
            "moving-shapes: the folder of the generated dataset is needed; run `stm generate` first, with the same --config"
        )
    listing = list_clips(generated, generated / "annotations.parquet", (".mp4",), "train")
    return generated, listing.clips, listing.refused


def _list_language(config: Config, dataset: LanguageDataset) -> tuple[Path, list[NamedClip], list[Refused]]:
    if has_images(dataset.source) and config.frames.min_frames > 1:
        raise DatasetError(
            f"frames.min_frames is {config.frames.min_frames}, but the clips of {dataset.source} are images, of one frame "
            "each: set it to 1"
        )
    copy = read_language(dataset)
    _log.info(check_language(dataset, copy).describe())
    return Path(dataset.root), copy.clips, copy.refused


def _may_miss(config: Config) -> bool:
    """Whether any number of files may be missing: true for a corpus and for a copy that the config declares partial."""
    dataset = config.dataset
    if isinstance(dataset, LanguageDataset) and is_corpus(dataset.source):
        return True
    return isinstance(dataset, BenchmarkDataset | LanguageDataset) and dataset.partial


def _policy_of_refused(config: Config, status: Status) -> Policy:
    policy = config.bad_input.action(status)
    return "drop" if policy == "keep" and status in _UNUSABLE else policy


def _receipt(config: Config) -> dict[str, Any]:
    """The receipt, without folder names, because the tables do not depend on where the videos are stored."""
    dataset = {
        name: value for name, value in _dataset(config).fingerprint().items() if name not in ("root", "annotations")
    }
    if isinstance(config.dataset, LanguageDataset):
        dataset["protocol"] = protocol_settings(config.dataset.source)
    settings = {"dataset": dataset, "bad_input": config.bad_input.fingerprint(), **_limits(config)}
    return make_receipt("manifest", settings, ("av",), **_seed(config))


def _seed(config: Config) -> dict[str, int]:
    """The seed of generated clips; empty for a folder or a benchmark, whose clips do not depend on it."""
    return {"seed": config.seed} if isinstance(config.dataset, MovingShapesDataset) else {}


def _limits(config: Config) -> dict[str, int]:
    return {"min_side": config.frames.min_side, "max_side": config.frames.max_side}


def _probe(
    config: Config, root: Path, clips: Sequence[NamedClip], journal: Journal, processes: int
) -> dict[str, Facts]:
    """The metadata of each file, by path; files probed by an earlier attempt are not opened again."""
    # Several clips may be segments of the same file, which is probed only once.
    stamps = {path: _stamp(root, path) for path in sorted({clip.clip.path for clip in clips})}
    facts: dict[str, Facts] = {}
    for path, stamp in stamps.items():
        known = journal.get(stamp)
        if known is not None:
            facts[path] = json.loads(known)
    lookup = FileLookup(root)
    missing = {lookup.join(path): path for path in stamps if path not in facts}
    timeout = _dataset(config).probe_timeout_seconds
    with Progress("manifest", len(stamps), "files") as progress:
        progress.resume(len(facts))
        for file, probed in probe_files(list(missing), _limits(config), processes, timeout):
            path = missing[file]
            facts[path] = probed
            # A timeout or crash may be the machine's fault: it is not recorded, so that the next attempt probes again.
            if probed["status"] not in (Status.TIMEOUT, Status.CRASHED):
                journal.put(stamps[path], json.dumps(probed).encode())
            progress.advance()
    return facts


def _stamp(root: Path, path: str) -> str:
    state = (root / path).stat()
    return f"{path}\0{state.st_size}\0{state.st_mtime_ns}"


_CHUNK = 1 << 16  # rows; a multiple of a row group, so that the bytes are those of a table made at once


def _write(path: Path, rows: Iterator[dict[str, Any]], schema: pa.Schema, receipt: dict[str, Any]) -> None:
    # In chunks: the rows of a large dataset take several times as much memory as its table.
    chunks = iter(lambda: list(islice(rows, _CHUNK)), [])
    tables = [pa.Table.from_pylist(chunk, schema=schema) for chunk in chunks]
    write_table(path, pa.concat_tables([schema.empty_table(), *tables]), receipt)


def list_fingerprint(config: Config, copy: DatasetCopy | None = None) -> str:
    """A hash of everything that the manifest reads, so that the workflow detects added, removed and changed files.

    - A folder: the bytes of the annotations, and the name, size and modification time of each file that they list or,
      without annotations, of each file under the root with one of `extensions`.
    - A benchmark: the bytes of its lists, and the name, size and modification time of each listed file that exists.
    - A corpus: the bytes of its lists and the names of its files; calling `stat` on ten million files would take hours.
    - moving-shapes: the dataset's settings and the seed.

    No video is opened. A missing folder also has a fingerprint; the manifest stage raises the error.

    Args:
        copy: from `read_copy`; by default it is read here. The lists of a large corpus take minutes to read.
    """
    digest = hashlib.sha256()
    dataset = _dataset(config)
    digest.update(json.dumps([dataset.fingerprint(), _seed(config)], sort_keys=True).encode())
    if isinstance(dataset, FolderDataset):
        annotations = None if dataset.annotations is None else Path(dataset.annotations)
        if annotations is not None and annotations.is_file():
            digest.update(bytes.fromhex(sha256_file(annotations)))
        files = _files_of_folder(Path(dataset.root), annotations, dataset.extensions)
    elif isinstance(dataset, BenchmarkDataset):
        lists, files = _listed_files(config, copy)
        digest.update(json.dumps(lists, sort_keys=True).encode())
    elif isinstance(dataset, LanguageDataset):
        lists, files = _listed_files(config, copy)
        digest.update(json.dumps([lists, protocol_settings(dataset.source)], sort_keys=True).encode())
        if is_corpus(dataset.source):
            digest.update("\n".join(files).encode("utf-8", "surrogatepass"))
            return digest.hexdigest()
    else:
        return digest.hexdigest()
    lookup = FileLookup(Path(dataset.root))
    for name in files:
        state = _state(dataset.root, name) or _state(dataset.root, lookup.find(name)[0])
        digest.update(f"{name}\0{state}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _listed_files(config: Config, copy: DatasetCopy | None) -> tuple[dict[str, str], list[str]]:
    """The hashes of the lists, and the existing listed files, sorted; nothing if the copy cannot be read."""
    try:
        copy = copy or read_copy(config)
    except DatasetError:
        return {}, []
    if copy is None:
        return {}, []
    lists = {path.as_posix(): sha256 for path, sha256 in copy.annotations.items()}
    return lists, sorted({named.clip.path for named in copy.clips})


def _files_of_folder(root: Path, annotations: Path | None, extensions: Sequence[str]) -> Iterable[str]:
    """The files that the manifest reads, relative to the root, sorted."""
    if annotations is None:
        return sorted(path for path, _ in walk_videos(root, extensions)) if root.is_dir() else []
    try:
        with warnings.catch_warnings(action="ignore"):  # the manifest stage emits them
            rows = [row for _, row in read_annotations(annotations) if isinstance(row, Mapping)]
    except AnnotationError:
        return []
    return sorted({row["path"] for row in rows if isinstance(row.get("path"), str)})


def _state(root: str, name: str) -> str:
    """A file's size and modification time; for a broken link, those of the link."""
    path = os.path.join(root, name)  # noqa: PTH118 (constructing a Path takes longer than the stat call)
    for look in (os.stat, os.lstat):
        try:
            state = look(path)
        except (OSError, ValueError) as error:  # missing, forbidden, too long, or not a valid name
            if is_machine_error(error):
                raise
            continue
        # A folder's modification time changes whenever an entry is added or removed, which is irrelevant here.
        return "folder" if stat.S_ISDIR(state.st_mode) else f"{state.st_size}\0{state.st_mtime_ns}"
    return ""
