"""What made the results and what it cost: Snakemake's benchmark files, the plan, the receipts.

Receipts say which model, with which hash, and which library versions made a stage's files (`stm.files.make_receipt`).
"""

import csv
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from stm.config import Config
from stm.files import hash_weights, read_json, read_receipt
from stm.layout import Layout
from stm.report.records import Results

# The order of the data's journey; rules that are not named here come after, by name.
ORDER = (
    "demo_models", "generate", "manifest", "split", "plan", "frames", "captions", "embeddings", "similarity", "motion",
    "shards", "pretrain", "evaluate", "mask_quality", "report",
)  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """One stage: what it used, and what the plan said. None: not known."""

    name: str
    jobs: int | None = None
    seconds: float | None = None  # wall clock, summed over the jobs
    cpu_seconds: float | None = None
    memory: float | None = None  # MB, the largest job
    planned_jobs: int | None = None
    planned_cpu_seconds: float | None = None
    planned_gpu_seconds: float | None = None
    planned_gigabytes: float | None = None


@dataclass(frozen=True)
class Model:
    """A model that a stage used, or made."""

    stage: str
    name: str
    sha256: str


@dataclass(frozen=True)
class Provenance:
    """Where the results come from."""

    stages: list[Stage]
    models: list[Model]
    versions: dict[str, str]  # library -> version, or versions when the stages' receipts differ
    receipts: dict[str, dict[str, Any]]  # stage -> the receipt of its first shard


def collect_provenance(config: Config, layout: Layout, results: Results) -> Provenance:
    """Benchmarks, plan and receipts under `layout`."""
    nothing: dict[str, dict[str, Any]] = {}
    used = results.attempt("benchmarks", partial(_read_benchmarks, layout.benchmarks), nothing)
    planned = results.attempt("plan", partial(_read_plan, layout.plan), nothing)
    names = sorted({*used, *planned}, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))
    receipts = _read_receipts(config, layout, results)
    models = [model for stage, receipt in receipts.items() for model in _models(stage, receipt)]
    for run in results.runs:
        if run.weights is not None:
            made = f"{run.settings.method}, {run.settings.model}"
            models += [Model(f"pretrain/{run.name}", made, hash_weights(run.weights))]
    stages = [Stage(name, **used.get(name, {}), **planned.get(name, {})) for name in names]
    return Provenance(stages, models, _merge_versions(receipts), receipts)


def _read_benchmarks(folder: Path) -> dict[str, dict[str, Any]]:
    """Per rule, summed over its jobs. A file has one row a repetition, of which the last one made the output."""
    used: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.rglob("*.tsv")):
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
    """A number of a benchmark file; None for `NA`, `-` and jobs too short to be sampled."""
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def _read_plan(path: Path) -> dict[str, dict[str, Any]]:
    values = read_json(path) if path.exists() else {}
    planned: dict[str, dict[str, Any]] = {}
    for entry in values.get("stages") or []:
        # The plan tells sources and runs apart, `captions/blip2`; Snakemake times rules.
        rule = str(entry["stage"]).partition("/")[0]
        seconds = {key: _number(entry.get(key)) for key in ("cpu_hours", "gpu_hours")}
        found = {
            "planned_jobs": _number(entry.get("jobs")),
            "planned_cpu_seconds": None if seconds["cpu_hours"] is None else seconds["cpu_hours"] * 3600,
            "planned_gpu_seconds": None if seconds["gpu_hours"] is None else seconds["gpu_hours"] * 3600,
            "planned_gigabytes": _number(entry.get("gigabytes")),
        }
        sums = planned.setdefault(rule, dict.fromkeys(found))
        for key, value in found.items():
            if value is not None:
                sums[key] = (sums[key] or 0) + (int(value) if key == "planned_jobs" else value)
    return planned


def _read_receipts(config: Config, layout: Layout, results: Results) -> dict[str, dict[str, Any]]:
    """One receipt a stage: that of the first shard that has one. All shards of a stage share their settings."""
    receipts: dict[str, dict[str, Any]] = {}
    nothing: dict[str, Any] = {}
    for stage, path in _receipt_paths(config, layout, results.shards):
        if stage not in receipts and path.exists():
            receipt = results.attempt(f"receipt of {path}", partial(read_receipt, path), nothing)
            if receipt:
                receipts[stage] = receipt
    for stage, path in _json_receipt_paths(config, layout):
        if path.exists():
            receipt = results.attempt(f"receipt of {path}", partial(_read_json_receipt, path), nothing)
            receipts |= {stage: receipt} if receipt else {}
    return receipts


def _read_json_receipt(path: Path) -> dict[str, Any]:
    return dict(read_json(path).get("receipt") or {})


def _json_receipt_paths(config: Config, layout: Layout) -> Iterator[tuple[str, Path]]:
    """Runs and evaluations keep theirs in their JSON files."""
    for run in config.pretrain:
        yield f"pretrain/{run}", layout.pretrain(run) / "config.json"
        for task in config.evaluate:
            yield f"evaluate/{run}/{task}", layout.evaluate(run, task) / "metrics.json"
    yield "mask_quality", layout.mask_quality


def _receipt_paths(config: Config, layout: Layout, shards: list[str]) -> Iterator[tuple[str, Path]]:
    yield "generate", layout.generated / "truth.parquet"
    yield "manifest", layout.manifest
    for shard in shards:
        yield "frames", layout.frames(shard)
        for source in config.captions:
            yield f"captions/{source}", layout.captions(source, shard)
        yield "embeddings", layout.embeddings(shard)
        for source in config.captions:
            yield f"similarity/{source}", layout.similarity(source, shard)
        yield "motion", layout.motion(shard)
        yield "shards", layout.shard(shard)


def _models(stage: str, receipt: Mapping[str, Any]) -> Iterator[Model]:
    """The model that a receipt names: an object `model` of its name and its weights' hash, or plain entries."""
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
