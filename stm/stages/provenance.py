"""Checks, before a job runs, that the files it reads were made with the present config.

While Snakemake's own records exist, they answer this. They do not travel with results that are copied to another folder,
and commands by hand do not read them; the receipts in the files always do. Every receipt is read once per process, and of a
packed shard only its own, which contains those of its parts: about 1.5 ms per shard on a local disk.
"""

import json
import logging
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from stm.config import Section
from stm.layout import Layout
from stm.stages.declaration import Files, Stage
from stm.stages.jobs import Job, Jobs
from stm.storage.files import read_json, sha256_file
from stm.storage.tables import DamagedError, read_receipt

_log = logging.getLogger(__name__)

_LISTED = 10  # differences in a message
_LONGEST = 80  # characters of a value in a message
_NAME = r"[A-Za-z0-9][A-Za-z0-9_-]*"
_MODEL = re.compile(r"(local-dir:|transformers:|[^/:@]+@)?(.*)")
_FACT = "facts."  # precedes the name of a fact in `Stage.records`
_ABSENT = object()

Maker = tuple[Stage, Job]


class StaleInputError(ValueError):
    """Files that a job reads were made with other settings, or from other files, than the present ones."""


@dataclass(frozen=True)
class Difference:
    """One deviation of a file from the config."""

    stage: str  # the stage that makes the file
    path: Path  # the file with the receipt
    problem: str


def check_inputs(stage: Stage, job: Job, stages: Mapping[str, Stage]) -> None:
    """Compare the receipts of all files that a job depends on with the config.

    Files without a receipt, and entries that an older receipt lacks, cannot be compared and are accepted.

    Args:
        stages: all stages, by name.

    Raises:
        StaleInputError: a file was made with a different value of a key, or from inputs that have been replaced since; the
            message names files, keys, both values and the remedy.
    """
    makers = list(_ancestors(stage, job, stages))
    differences = [found for maker in makers for found in _compare(*maker)]
    _log.debug(f"{stage.name}: compared the receipts of {len(makers)} jobs with the config: {len(differences)} differ")
    if differences:
        raise StaleInputError(_describe(differences, "the results that this job reads"))


def check_finished(stage: Stage, job: Job, stages: Mapping[str, Stage]) -> None:
    """Compare the receipt of a job's own files with the config, for files of which Snakemake has no record.

    Raises:
        StaleInputError: they were made with a different value of a key, or from other inputs; the message names all results
            of the config of which this is true, so that one command makes them again.
    """
    own = list(_compare(stage, job))
    if own:
        # Fresh jobs: listing the shards must not make Snakemake wait for them.
        page = Jobs(job.study).make()
        others = [found for maker in _ancestors(stages["report"], page, stages) for found in _compare(*maker)]
        raise StaleInputError(_describe([*others, *own], "finished results"))


def _ancestors(stage: Stage, job: Job, stages: Mapping[str, Stage]) -> Iterator[Maker]:
    """Yield the stages and jobs that a job depends on, directly or indirectly, each once."""
    seen: set[tuple[str, Job]] = set()
    waiting = deque(_makers(stage, job, stages))
    while waiting:
        maker, made = waiting.popleft()
        if (maker.name, made) not in seen:
            seen.add((maker.name, made))
            yield maker, made
            recorded = {(owner.name, own) for owner, own, _ in _recorded_parts(maker, made)}
            waiting += (
                (owner, own) for owner, own in _makers(maker, made, stages) if (owner.name, own) not in recorded
            )


def _makers(stage: Stage, job: Job, stages: Mapping[str, Stage]) -> Iterator[Maker]:
    """Yield the stages and jobs that make the inputs of a job."""
    for value in _files(stage.inputs, job).values():
        for path in [value] if isinstance(value, Path) else value:
            maker = job.jobs.once(("maker", path), partial(_find_maker, path, job.jobs, stages))
            if maker is not None:
                yield maker


def _files(find: Callable[[Job], Files], job: Job) -> Files:
    try:
        return find(job)
    except (ValueError, OSError):
        # For example, the number of shards is not known yet. A stage that needs the files reports this itself.
        return {}


def _find_maker(path: Path, jobs: Jobs, stages: Mapping[str, Stage]) -> Maker | None:
    """Return the stage and job that make a file; None for files that the workflow does not make."""
    patterns = jobs.once("output patterns", lambda: list(_patterns(jobs, stages)))
    # Most files have a neighbour that was found before: with 10,000 shards, trying all patterns for each takes a minute.
    found: list[tuple[str, re.Pattern[str]]] = jobs.once(("pattern", path.parent), lambda: [])
    for name, pattern in [*found, *patterns]:
        if match := pattern.fullmatch(path.as_posix()):
            if (name, pattern) not in found:
                found.append((name, pattern))
            stage = stages[name]
            return stage, jobs.make(**{key: value for key, value in match.groupdict().items() if key in stage.per})
    return None


def _patterns(jobs: Jobs, stages: Mapping[str, Stage]) -> Iterator[tuple[str, re.Pattern[str]]]:
    """Yield the pattern of each output path, with the wildcards as named groups."""
    datasets = "|".join(map(re.escape, jobs.configs))
    for stage in stages.values():
        if "dataset" not in stage.per and stage.name not in ("table", "figure"):
            continue
        outputs = stage.outputs(jobs.make(**{name: f"{{{name}}}" for name in stage.per}))
        paths = list(outputs.values())
        if stage.name == "split":  # which does not declare its slices, because their number is unknown
            paths.append(Layout.of(jobs.study, "{dataset}").slice("{shard}"))
        for path in paths:
            pattern = re.escape(path.as_posix())
            for name in ("dataset", "source", "split", "shard", "run", "task", "table", "figure"):
                known = datasets if name == "dataset" else _NAME
                pattern = pattern.replace(re.escape(f"{{{name}}}"), f"(?P<{name}>{known})")
            yield stage.name, re.compile(pattern)


def _receipt_path(stage: Stage, job: Job) -> Path | None:
    path: Path | None = stage.outputs(job)[stage.receipt] if stage.receipt is not None else None
    return path if path is not None and path.exists() else None


def _read(path: Path, jobs: Jobs) -> dict[str, Any]:
    """Return the receipt in a Parquet or JSON file; empty if it has none or cannot be read, which its reader reports."""

    def read() -> dict[str, Any]:
        try:
            receipt = read_json(path).get("receipt") if path.suffix == ".json" else read_receipt(path)
        except (OSError, ValueError, AttributeError, DamagedError):
            return {}
        return receipt if isinstance(receipt, dict) else {}

    return jobs.once(("receipt", path), read)


def _recorded_parts(stage: Stage, job: Job) -> Iterator[tuple[Stage, Job, Mapping[str, Any]]]:
    """Yield the parts of a file whose receipts are in its own: stage, job and receipt."""
    path = _receipt_path(stage, job)
    recorded = _read(path, job.jobs).get("parts", {}) if path is not None else {}
    if recorded:
        for name, (owner, own_job) in stage.parts(job).items():
            if name in recorded:
                yield owner, own_job, recorded[name]


def _compare(stage: Stage, job: Job) -> Iterator[Difference]:
    """Yield the deviations of the file of a job from the config and from its inputs."""
    path = _receipt_path(stage, job)
    if path is None:
        return
    receipt = _read(path, job.jobs)
    for problem in (*_compare_settings(stage, job, receipt), *_compare_hashes(stage, job, receipt)):
        yield Difference(stage.name, path, problem)
    for owner, own_job, part in _recorded_parts(stage, job):
        for problem in _compare_settings(owner, own_job, part):
            yield Difference(owner.name, path, problem)


def _compare_hashes(stage: Stage, job: Job, receipt: Mapping[str, Any]) -> Iterator[str]:
    for entry, files in _files(stage.hashed, job).items():
        recorded = receipt.get(entry)
        if isinstance(files, Path) and isinstance(recorded, str) and files.exists():
            if recorded != job.jobs.once(("sha256", files), partial(sha256_file, files)):
                yield f"was made from a different {files}"
        elif isinstance(files, list) and isinstance(recorded, Mapping):
            current = {path: str(_read(path, job.jobs).get("tar_sha256", "")) for path in files}
            # Shards without a hash, or that are not there any more, cannot be compared.
            if all(current.values()) and sorted(recorded.values()) != sorted(current.values()):
                other = [path for path, digest in current.items() if digest not in recorded.values()]
                first = next(iter([*other, *files]), "those of the config")
                yield f"was made from different shards than {first}"


def _compare_settings(stage: Stage, job: Job, receipt: Mapping[str, Any]) -> Iterator[str]:
    for entry, key in stage.records.items():
        made: Any = receipt
        for part in entry.split("."):
            made = made.get(part, _ABSENT) if isinstance(made, Mapping) else _ABSENT
        if made is not _ABSENT:
            problems = _compare_value(stage, job, key, made)
            # A shard may hold guides that nothing reads any more.
            if problems and (job.guided or _compare_value(stage, replace(job, shard=""), key, made)):
                yield from problems


def _compare_value(stage: Stage, job: Job, key: str, made: Any) -> list[str]:
    # The shard is left out, because all shards with guides have the same settings, and all without.
    wanted = ("wanted", stage.name, key, job.dataset, job.source, job.guided, job.run, job.task)
    value, section = job.jobs.once(wanted, partial(_wanted, stage, job, key))
    return [] if made == value else list(_differences(_display(job, key), made, value, section, stage.implied))


def _wanted(stage: Stage, job: Job, key: str) -> tuple[Any, bool]:
    """Return the config's JSON value of a recorded entry, and whether it is a section, of which a receipt may omit keys."""
    if key.startswith(_FACT):
        return json.loads(json.dumps(stage.facts(job)[key.removeprefix(_FACT)])), True
    value = job.value(key)
    if key.endswith(".seed") and value is None:
        return job.study.seed, False
    return json.loads(json.dumps(job.settings([key])[key])), isinstance(value, Section)


def _display(job: Job, key: str) -> str:
    """Return a key as the user writes it: a run in its section `pretrain`, where it has no seed in its name."""
    if not key.startswith("runs.{run}"):
        return key.removeprefix(_FACT).format_map(vars(job))
    name = next((name for name in job.study.pretrain if job.run in job.study.instances(name)), job.run)
    return f"pretrain.{name}{key.removeprefix('runs.{run}')}"


def _differences(key: str, made: Any, wanted: Any, section: bool, implied: Mapping[str, Any]) -> Iterator[str]:
    if not section or not isinstance(made, Mapping):
        yield from _leaves(key, made, wanted)
        return
    made, wanted = {**implied, **made}, {**implied, **wanted}
    for name in made:
        if name in wanted:
            yield from _leaves(f"{key}.{name}", made[name], wanted[name])


def _leaves(key: str, made: Any, wanted: Any) -> Iterator[str]:
    """Yield one line per innermost key with different values."""
    for name, before, now in changed_leaves(key, made, wanted):
        if not (name.endswith(".model") and _same_model(before, now)):
            yield f"was made with {name} = {show(before)}, the config says {show(now)}"


def changed_leaves(key: str, made: Any, wanted: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield the innermost keys under `key` with different values, and both values; see `show` for one that is absent."""
    if isinstance(made, Mapping) and isinstance(wanted, Mapping):
        for name in {**made, **wanted}:
            yield from changed_leaves(f"{key}.{name}", made.get(name, _ABSENT), wanted.get(name, _ABSENT))
    elif made != wanted:
        yield key, made, wanted


def _same_model(made: Any, wanted: Any) -> bool:
    """Whether two model ids differ only in a local folder, which receipts do not contain."""
    return _base_name(wanted) == str(made).removeprefix("local:") or _base_name(made) == wanted


def _base_name(model: Any) -> str:
    # Receipts of captions mark a local folder, see `stm.pretrained.hub`; the config does not.
    name = str(model).removeprefix("local:")
    prefix, name = _MODEL.fullmatch(name).groups(default="")  # type: ignore[union-attr]
    return f"{prefix}{name.rstrip('/').rpartition('/')[2]}"


def show(value: Any) -> str:
    """Return a value of the config as a message shows it."""
    text = "nothing" if value is _ABSENT else json.dumps(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _describe(differences: list[Difference], what: str) -> str:
    files: dict[str, dict[Path, None]] = {}
    for difference in differences:
        files.setdefault(difference.problem, {})[difference.path] = None
    lines = [
        f"  {next(iter(paths))}{f' (and {len(paths) - 1} more)' if len(paths) > 1 else ''} {problem}"
        for problem, paths in files.items()
    ]
    if len(lines) > _LISTED:
        lines = [*lines[:_LISTED], f"  and {len(lines) - _LISTED} more differences"]
    stages = list(dict.fromkeys(difference.stage for difference in differences))
    remedy = f"snakemake --forcerun {' '.join(stages)}"
    return "\n".join(
        [
            f"{what} do not belong to this config:",
            *lines,
            f"To make them and all that follows again: {remedy} (before --configfile); to keep them, restore these keys",
        ]
    )
