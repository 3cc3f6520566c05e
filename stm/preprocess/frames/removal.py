"""Frames that are removed once their shard is packed (`frames.keep: false`), and made again when a job needs them.

Snakemake's `temp()` is not used: when it makes a removed file again, it also repeats every job that has ever read the file, and
all that follows. A changed caption source would thus train all runs again. Instead, an empty file of the same modification time
stays in place of the tar, and the job that needs the frames fills it again; nothing else is repeated. The frames come from the
packed shard while that exists; otherwise, the videos are decoded again. The rule `shards` therefore updates its outputs: by
default, Snakemake would delete the shard before the job that packs it again, and the only copy of its frames.
"""

import logging
import os
import shutil
import time
from pathlib import Path

from stm.jobs.lock import JobRunningError, only_job
from stm.layout import dataset_root
from stm.preprocess.frames.stage import Lender, find_lenders
from stm.preprocess.frames.table import are_removed
from stm.stages.jobs import Job
from stm.storage.files import atomic_path
from stm.storage.tables import DamagedError, read_receipt, read_table

_log = logging.getLogger(__name__)

_WAIT_SECONDS = 2.0  # between looks at another job that decodes the same shard


def remove_frames(tar: Path) -> None:
    """Replace a tar by an empty file of the same modification time, so that Snakemake has no reason to run a job again."""
    # A result of Snakemake's cache, which other projects may use, is a link.
    if tar.is_symlink() or are_removed(tar):
        return
    modified = tar.stat().st_mtime_ns
    with atomic_path(tar) as empty:
        empty.touch()
        os.utime(empty, ns=(modified, modified))


def restore_frames(job: Job, processes: int) -> None:
    """Make the frames of a job's shard again if they were removed; the tar becomes the same, byte for byte.

    Raises:
        DamagedError: the videos, or the libraries that decode them, are no longer those of the index.
    """
    tar, index = job.layout.frames_tar(job.shard), job.layout.frames(job.shard)
    while index.exists() and are_removed(tar):
        try:
            with only_job(tar):
                if are_removed(tar):
                    _extract_again(job, tar, index, processes)
        except JobRunningError:  # for instance that of another caption source, which needs them, too
            time.sleep(_WAIT_SECONDS)


def _extract_again(job: Job, tar: Path, index: Path, processes: int) -> None:
    # Jobs that find their frames need no decoder.
    from stm.preprocess.frames.extract import extract_frames

    _log.info(f"frames {tar.stem}: were removed after packing, and are made again")
    folder = tar.with_name(f".{tar.stem}.again")
    made, table = folder / tar.name, folder / index.name
    folder.mkdir(exist_ok=True)
    config = job.config
    extract_frames(
        job.layout.slice(job.shard),
        dataset_root(config),
        made,
        table,
        config.frames,
        config.bad_input,
        processes,
        [Lender.of(job.layout, job.shard), *find_lenders(job)],
    )
    expected, found = read_receipt(index), read_receipt(table)
    if found["tar_sha256"] != expected.get("tar_sha256"):
        changed = found["versions"] != expected.get("versions")
        why = (
            f"made with {expected.get('versions')}, now {found['versions']}" if changed else _find_change(index, table)
        )
        shutil.rmtree(folder)
        raise DamagedError(
            f"{tar}: its frames were removed after packing (frames.keep: false), and come out differently now: {why}",
            "bring the videos back as they were, or make the frames of all shards again (--forcerun frames)",
        )
    modified = (tar if tar.exists() else index).stat().st_mtime_ns
    os.utime(made, ns=(modified, modified))
    made.replace(tar)
    shutil.rmtree(folder)


def _find_change(index: Path, table: Path) -> str:
    """Say which clips of an index are other ones in a table that was made again, and what became of the first."""
    before, now = ({row["key"]: row for row in read_table(path).to_pylist()} for path in (index, table))
    changed = [key for key in before if now.get(key, {}).get("sha256") != before[key]["sha256"]]
    if not changed:
        return "the videos have changed"
    first, row = before[changed[0]], now.get(changed[0])
    became = "is no longer in the slice" if row is None else "has other frames" if row["kept"] else row["detail"]
    return f"{len(changed)} of {len(before)} clips have changed, for instance {first['video_id']!r} ({first['path']}): {became}"
