"""Read every result that the page shows into the dataclasses of `stm.report.results.records`.

Missing results remain empty. A file that exists but cannot be read adds a line to `problems`: users also consult the
report to find out what went wrong.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from stm.config import Config
from stm.layout import Layout
from stm.manifest import SHARD_PATTERN, order_shards, read_shards, split_of
from stm.report.results.evaluations import read_evaluation
from stm.report.results.records import (
    NOT_LOSSES,
    CaptionSummary,
    CropAgreement,
    Curve,
    DatasetResults,
    Evaluation,
    MaskQualityRow,
    Refusal,
    Results,
    Run,
    Split,
    Study,
)
from stm.shards.schema import ARRAYS
from stm.storage.files import read_json
from stm.storage.tables import read_table


def collect_study(config: Config, layout: Layout) -> Study:
    """Read the results of all datasets; a config with a single dataset stores them in its own folder, `layout`."""
    datasets = []
    for name in config.dataset_names:
        dataset_config = config.of(name)
        dataset_layout = Layout.of(config, name) if config.datasets else layout
        results = collect(dataset_config, dataset_layout, config)
        datasets.append(DatasetResults(name, dataset_config, dataset_layout, results))
    return Study(config, datasets)


def collect(config: Config, layout: Layout, study: Config | None = None) -> Results:
    """Read the results of one dataset.

    Args:
        config: the dataset's own config.
        layout: the location of its results.
        study: the config of all datasets, which names the evaluations; `config` itself by default.
    """
    results = Results()
    results.shards = results.attempt("shards", partial(find_shards, layout), [])
    results.splits = results.attempt("splits", partial(_read_splits, layout, results.shards), [])
    results.runs = [
        _read_run(config, layout, name, instance, (study or config), results)
        for name in config.pretrain
        for instance in config.instances(name)
    ]
    if layout.mask_quality.exists():
        read_quality = partial(_read_mask_quality, layout.mask_quality, config.name if study and study.datasets else "")
        results.mask_quality = results.attempt("mask quality", read_quality, [])
    if layout.crop_agreement.exists():
        read = partial(_read_crop_agreement, layout.crop_agreement)
        results.crop_agreement = results.attempt("crop agreement", read, None)
    for source in config.captions:
        paths = _existing(layout.captions(source, shard) for shard in results.shards)
        if paths:
            summary = results.attempt(f"captions {source}", partial(_summarise, source, paths), None)
            results.captions += [summary] if summary else []
    results.refusals = _read_refusals(config, layout, results)
    return results


def find_shards(layout: Layout) -> list[str]:
    """Return the names of all shards, packed or not."""
    if layout.shard_index.exists():
        return read_shards(layout.shard_index)
    # A run that stopped early may have manifest slices but no index of shards yet.
    stems = (path.stem for path in layout.slices.glob("*.parquet"))
    return order_shards(stem for stem in stems if re.fullmatch(SHARD_PATTERN, stem))


def _existing(paths: Iterable[Path]) -> list[Path]:
    return [path for path in paths if path.exists()]


def _read_splits(layout: Layout, shards: list[str]) -> list[Split]:
    """Count clips per split: listed in the manifest, kept by the frames stage, packed into shards."""
    listed: Counter[str] = Counter()
    if layout.manifest.exists():
        listed.update(str(row["split"]) for row in read_table(layout.manifest, ["split"]).to_pylist())
    kept: dict[str, int] = {}
    packed: dict[str, int] = {}
    for shard in shards:
        split = split_of(shard)
        if layout.frames(shard).exists():
            column = read_table(layout.frames(shard), ["kept"]).column("kept").to_pylist()
            kept[split] = kept.get(split, 0) + sum(map(bool, column))
        if layout.shard(shard).exists():
            packed[split] = packed.get(split, 0) + read_table(layout.shard(shard), ["key"]).num_rows
    names = sorted({*listed, *kept, *packed})
    return [Split(name, listed[name], kept.get(name), packed.get(name)) for name in names]


def _read_run(config: Config, layout: Layout, name: str, instance: str, study: Config, results: Results) -> Run:
    folder = layout.pretrain(instance)
    nothing: dict[str, Curve] = {}
    curves = results.attempt(f"losses of {instance}", partial(_read_losses, folder / "metrics.jsonl"), nothing)
    steps, losses = curves.pop("loss", ([], []))
    evaluations: dict[str, Evaluation] = {}
    for task in study.evaluate:
        path = layout.evaluate(instance, task) / "metrics.json"
        if name in study.runs_of(task) and path.exists():
            evaluation = results.attempt(f"{task} of {instance}", partial(read_evaluation, path, instance, task), None)
            evaluations |= {task: evaluation} if evaluation else {}
    weights = folder / "weights.safetensors"
    settings = config.runs[instance]
    return Run(instance, settings, steps, losses, weights if weights.exists() else None, evaluations, curves)


def _read_losses(path: Path) -> dict[str, Curve]:
    """Read the curves of the total loss (`loss`) and of each objective; skips incomplete lines, as of a run in progress."""
    by_name: dict[str, dict[int, float]] = {}
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for line in lines:
        try:
            entry = json.loads(line)
            step = int(entry.pop("step"))
            values = {name: float(value) for name, value in entry.items() if name not in NOT_LOSSES}
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
        for name, value in values.items():
            if math.isfinite(value):
                # A resumed run may repeat a step; only the later result affected the weights.
                by_name.setdefault(name, {})[step] = value
    return {name: (sorted(values), [values[step] for step in sorted(values)]) for name, values in by_name.items()}


def _interval(value: Any) -> tuple[float, float] | None:
    return None if value is None or None in value else (float(value[0]), float(value[1]))


def _read_crop_agreement(path: Path) -> CropAgreement | None:
    values = read_json(path)
    return CropAgreement(
        iou=float(values["iou"]),
        interval=(float(values["low"]), float(values["high"])),
        chance=float(values["chance_iou"]),
        crops=int(values["crops"]),
        ratio=float(values["ratio"]),
        # Results of earlier versions lack these.
        smaller_iou=None if values.get("smaller_iou") is None else float(values["smaller_iou"]),
        smaller_crops=int(values.get("smaller_crops", 0)),
    )


def _read_mask_quality(path: Path, dataset: str) -> list[MaskQualityRow]:
    values = read_json(path)
    rows = [
        MaskQualityRow(
            guide=str(row["guide"]),
            source=str(row.get("source") or ""),
            camera=str(row.get("camera") or "all"),
            ratio=float(row["ratio"]),
            coverage=float(row["coverage"]),
            interval=_interval((row.get("low"), row.get("high"))),
            clips=int(row["clips"]),
            chance=float(row["chance"]),
            dataset=dataset,
        )
        for row in (values["rows"] if isinstance(values, dict) else values)
    ]
    return sorted(rows, key=lambda row: row.ratio)  # group masks of equal ratio; otherwise keep the file's order


def _summarise(source: str, paths: list[Path], examples: int = 6) -> CaptionSummary:
    """Count captions, and use one previously unseen caption from each of the first clips as an example."""
    captions_per_clip: dict[str, int] = {}
    distinct: set[str] = set()
    example_by_clip: dict[str, str] = {}
    for path in paths:
        table = read_table(path, ["video_id", "caption"])
        for video_id, caption in zip(*(table.column(c).to_pylist() for c in ("video_id", "caption")), strict=True):
            captions_per_clip[video_id] = captions_per_clip.get(video_id, 0) + (caption is not None)
            if caption is None:
                continue
            if caption not in distinct and video_id not in example_by_clip and len(example_by_clip) < examples:
                example_by_clip[video_id] = caption
            distinct.add(caption)
    counts = captions_per_clip.values()
    return CaptionSummary(
        source=source,
        clips=len(counts),
        captions=sum(counts),
        distinct=len(distinct),
        failed=sum(count == 0 for count in counts),
        examples=list(example_by_clip.items()),
    )


def _read_refusals(config: Config, layout: Layout, results: Results) -> list[Refusal]:
    """Read the quarantine table and the later stages' rows whose status is not `ok`; one per clip, stage and status.

    The text stage is excluded, because it only repeats the statuses of the captions stage.
    """
    paths: list[tuple[str, Path]] = [("manifest", layout.quarantine)]
    for shard in results.shards:
        paths += [("frames", layout.frames(shard))]
        # Each packed array is created by the stage of the same name, whose table stores a status per clip.
        paths += [(name, layout.table(name, shard)) for name, array in ARRAYS.items() if not array.per_source]
        for source in config.captions:
            paths += [(f"captions/{source}", layout.captions(source, shard))]
            paths += [(f"similarity/{source}", layout.similarity(source, shard))]
    refusals: set[Refusal] = set()
    for stage, path in paths:
        if path.exists():
            refusals |= results.attempt(str(path), partial(_not_ok, stage, path), set())
    return sorted(refusals)


def _not_ok(stage: str, path: Path) -> set[Refusal]:
    fields = ["stage", "video_id", "path", "status", "policy", "detail"]
    present = pq.read_schema(path).names  # not every table has `stage` and `path`
    rows = read_table(path, [name for name in fields if name in present]).to_pylist()
    return {
        Refusal(**{name: str(row.get(name) or (stage if name == "stage" else "")) for name in fields})
        for row in rows
        if row["status"] != "ok"
    }
