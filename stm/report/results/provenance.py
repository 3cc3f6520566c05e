"""Provenance and cost of the results, from Snakemake's benchmark files, the plan and the receipts.

Receipts record the model, its hash and the library versions behind a stage's files; see
`stm.storage.receipts.make_receipt`.
"""

import csv
import json
import math
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import stm
from stm.config import Config, ConfigError, load_config
from stm.layout import Layout
from stm.pretrained.local_files import hash_weights
from stm.report.results.records import DatasetResults, Study
from stm.stages.jobs import Jobs
from stm.stages.journey import all_stages
from stm.storage.files import read_json, sha256_file, write_bytes
from stm.storage.receipts import library_versions
from stm.storage.shipped import NotShippedError, shipped
from stm.storage.tables import read_receipt


@dataclass(frozen=True)
class StageUse:
    """Actual and planned usage of one stage. None: unknown."""

    name: str
    jobs: int | None = None
    seconds: float | None = None  # wall clock, summed over the jobs
    cpu_seconds: float | None = None
    memory: float | None = None  # MB, maximum over the jobs
    planned_jobs: int | None = None
    planned_cpu_seconds: float | None = None
    planned_gpu_seconds: float | None = None
    planned_loading_seconds: float | None = None  # core seconds of data loading for GPU jobs
    planned_gigabytes: float | None = None


@dataclass(frozen=True)
class Model:
    """A model that a stage used or produced."""

    stage: str
    name: str
    sha256: str


@dataclass(frozen=True)
class Provenance:
    """Provenance of the results."""

    stages: list[StageUse]
    models: list[Model]
    versions: dict[str, str]  # library -> version, or all versions if the stages' receipts differ
    receipts: dict[str, dict[str, Any]]  # stage, or stage/dataset -> the receipt of its first shard


def collect_provenance(study: Study, layout: Layout) -> Provenance:
    """Collect the benchmarks and receipts of all datasets, and the plan from `layout`, the config's own folder."""
    nothing: dict[str, dict[str, Any]] = {}
    folders = dict.fromkeys([*(dataset.layout.benchmarks for dataset in study.datasets), layout.benchmarks])
    used = study.own.attempt("benchmarks", partial(_read_benchmarks, list(folders)), nothing)
    planned = study.own.attempt("plan", partial(_read_plan, layout.plan), nothing)
    order = list(all_stages())
    names = sorted({*used, *planned}, key=lambda name: (order.index(name) if name in order else len(order), name))
    receipts: dict[str, dict[str, Any]] = {}
    for dataset in study.datasets:
        receipts |= _read_receipts(dataset, study.config)
    models = [model for stage, receipt in receipts.items() for model in _models(stage, receipt)]
    for run in (run for group in study.groups for run in group.instances):
        if run.weights is not None:
            made = f"{run.settings.method}, {run.settings.model}"
            models += [Model(f"pretrain/{run.name}", made, hash_weights(run.weights))]
    stages = [StageUse(name, **used.get(name, {}), **planned.get(name, {})) for name in names]
    return Provenance(stages, models, _merge_versions(receipts), receipts)


def describe_results(config: Config, provenance: Provenance) -> dict[str, Any]:
    """Return what a later comparison must know of results: the config, what they were made with, and how long it took.

    `environment` is that of the report: stages may have run earlier, with other code, or on other machines; `versions` are those
    in the stages' receipts. `file` is the name of the config that comes with stm, if it is one.
    """
    try:
        file = find_config_file(config, shipped("config"))
    except NotShippedError:  # which is no reason to have no report
        file = None
    return {
        "config": config.model_dump(mode="json"),
        "file": None if file is None else file.stem,
        "environment": {**dict(describe_environment()), "Cores": str(os.cpu_count())},
        "versions": provenance.versions,
        "stages": [
            {"name": stage.name, "jobs": stage.jobs, "seconds": stage.seconds, "cpu_seconds": stage.cpu_seconds}
            for stage in provenance.stages
            if stage.jobs is not None
        ],
    }


def write_provenance(path: Path, described: Mapping[str, Any]) -> None:
    """Write what `describe_results` returned as JSON, in its order: that of runs and evaluations is the order of tables."""
    write_bytes(path, (json.dumps(described, indent=2, allow_nan=False) + "\n").encode())


def describe_environment() -> list[tuple[str, str]]:
    """Return what this page was made with, as (name, value) pairs: code, Python, torch, platform and locked packages."""
    root = shipped()
    lock = root / "requirements.lock"
    locked = (
        f"requirements.lock, SHA-256 {sha256_file(lock)}" if lock.exists() else "requirements.lock is not available"
    )
    return [
        ("Code", describe_code(root)),
        ("Python", platform.python_version()),
        ("torch", library_versions(["torch"])["torch"]),
        ("Platform", platform.platform()),
        ("Packages", locked),
    ]


def describe_code(root: Path) -> str:
    """Return the git commit of the code in `root`, or the package's version if it is not a checkout."""
    version = f"stm {stm.__version__}"
    # Without this check, git would answer for a repository around an installed package.
    commit = _git(root, "rev-parse", "HEAD") if (root / ".git").exists() else None
    if not commit:
        return f"{version}, not from a git checkout"
    changes = _git(root, "status", "--porcelain", "--untracked-files=no")
    state = ", with unknown changes" if changes is None else ", with uncommitted changes" if changes else ""
    return f"{version}, commit {commit}{state}"


def _git(root: Path, *arguments: str) -> str | None:
    """Return what a git command prints; None if it fails or git is not installed."""
    try:
        done = subprocess.run(  # noqa: S603
            ["git", *arguments],  # noqa: S607
            cwd=root,
            capture_output=True,
            text=True,
            check=False,
            timeout=20,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def find_config_file(config: Config, folder: Path = Path("config")) -> Path | None:
    """Return the file in `folder` that contains exactly this config, or None."""
    for path in sorted(folder.glob("*.yaml")):
        try:
            if load_config(path) == config:
                return path
        except ConfigError:
            continue
    return None


def _read_benchmarks(folders: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Sum the usage per rule over its jobs. A file has one row per repetition; the last one produced the output."""
    used: dict[str, dict[str, Any]] = {}
    for folder, path in ((place, file) for place in folders for file in sorted(place.rglob("*.tsv"))):
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t"))
        if not rows:
            continue
        parts = path.relative_to(folder).parts
        rule = parts[0] if len(parts) > 1 else path.stem
        entry = used.setdefault(rule, {"jobs": 0, "seconds": 0.0, "cpu_seconds": None, "memory": None})
        entry["jobs"] += 1
        entry["seconds"] += _number(rows[-1].get("s")) or 0.0
        cpu, memory = _number(rows[-1].get("cpu_time")), _number(rows[-1].get("max_rss"))
        if cpu is not None:
            entry["cpu_seconds"] = (entry["cpu_seconds"] or 0.0) + cpu
        if memory is not None:
            entry["memory"] = max(entry["memory"] or 0.0, memory)
    return used


def _number(text: Any) -> float | None:
    """Parse a number from a benchmark file; None for `NA`, `-` and jobs too short to be sampled."""
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def _read_plan(path: Path) -> dict[str, dict[str, Any]]:
    values = read_json(path) if path.exists() else {}
    planned: dict[str, dict[str, Any]] = {}
    for entry in values.get("stages") or []:
        # The plan distinguishes datasets, sources and runs (`captions/k400/blip2`); Snakemake times whole rules.
        rule = str(entry["stage"]).partition("/")[0]
        found = {"planned_jobs": _number(entry.get("jobs")), "planned_gigabytes": _number(entry.get("gigabytes"))}
        for kind in ("cpu", "gpu", "loading"):
            hours = _number(entry.get(f"{kind}_hours"))
            found[f"planned_{kind}_seconds"] = None if hours is None else hours * 3600
        sums = planned.setdefault(rule, dict.fromkeys(found))
        for key, value in found.items():
            if value is not None:
                sums[key] = (sums[key] or 0) + (int(value) if key == "planned_jobs" else value)
    return planned


def _read_receipts(dataset: DatasetResults, whole: Config) -> dict[str, dict[str, Any]]:
    """Read one receipt per stage, from the first shard that has one; all shards of a stage share their settings.

    Stages are named as in the plan: `captions/blip2`, or `captions/k400/blip2` with several datasets.
    """
    receipts: dict[str, dict[str, Any]] = {}
    nothing: dict[str, Any] = {}
    for name, path in _receipt_files(dataset, whole):
        if name not in receipts and path.exists():
            receipt = dataset.results.attempt(f"receipt of {path}", partial(_read_receipt, path), nothing)
            receipts |= {name: receipt} if receipt else {}
    return receipts


def _receipt_files(dataset: DatasetResults, whole: Config) -> Iterator[tuple[str, Path]]:
    """Yield the display name and path of each file of a dataset that contains a receipt."""
    jobs = Jobs(whole, list_shards=lambda name: dataset.results.shards)
    for stage in all_stages().values():
        if stage.receipt is None or "dataset" not in stage.per:
            continue
        for job in stage.each(jobs, dataset.name):
            # A run's name already identifies the dataset that it trains on.
            named = dataset.name if whole.datasets and not job.run else ""
            parts = [stage.name, named, job.source, job.run, job.task]
            yield "/".join(filter(None, parts)), stage.outputs(job)[stage.receipt]


def _read_receipt(path: Path) -> dict[str, Any]:
    """Read a receipt from a table's metadata or from its key in a JSON file."""
    return dict(read_json(path).get("receipt") or {}) if path.suffix == ".json" else read_receipt(path)


def _models(stage: str, receipt: Mapping[str, Any]) -> Iterator[Model]:
    """Yield the model in a receipt: its name and weights hash, from the object `model` or from the top level."""
    described = receipt.get("model")
    entries = described if isinstance(described, Mapping) else receipt
    settings = receipt.get("settings")
    name = entries.get("model") or (settings.get("model") if isinstance(settings, Mapping) else None)
    for key, value in sorted(entries.items()):
        if "sha256" in key and ("model" in key or "weights" in key) and isinstance(value, str):
            yield Model(stage, str(name or "?"), value)


def _merge_versions(receipts: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    found: dict[str, set[str]] = {}
    for receipt in receipts.values():
        for library, version in (receipt.get("versions") or {}).items():
            found.setdefault(str(library), set()).add(str(version))
    return {library: " and ".join(sorted(found[library])) for library in sorted(found)}
