"""What the page says in words and small tables: findings, facts of the setup, time, captions, refusals."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from stm.config import Blip2Captions, Config, HumanCaptions, LabelCaptions, LanguageRun, PretrainRun
from stm.jobs.progress import format_seconds
from stm.report.results.provenance import Provenance, StageUse
from stm.report.results.records import MaskQualityRow, Measured, Results, RunGroup, Study, best_mean
from stm.report.tables import Cell, Table, count, number, title, words


def findings(study: Study) -> list[str]:
    """The few numbers that a reader looks for first, in sentences."""
    groups = study.groups
    lines = [_best_run(task, groups) for task in study.config.evaluate]
    for dataset in study.datasets:
        settings, rows = dataset.config.mask_quality, dataset.results.mask_quality
        if settings is not None:
            compared = _comparable(rows, settings.text_ratio, next(iter(dataset.config.pack.sources), None))
            lines += [_masks(camera, compared) for camera in ("fixed", "moving")]
    return [line for line in lines if line]


def chances(groups: Sequence[RunGroup]) -> dict[str, float]:
    """Chance level of each evaluation that has been done and has one; captions have none."""
    runs = [run for group in groups for run in group.instances]
    found = {task: found.headline.chance for run in reversed(runs) for task, found in run.evaluations.items()}
    return {task: chance for task, chance in found.items() if chance is not None}


def _best_run(task: str, groups: Sequence[RunGroup]) -> str:
    scored = [(group, found) for group in groups if (found := group.score(task)) is not None]
    trained = [entry for entry in scored if entry[0].settings.optimisation.epochs > 0]
    if not trained:
        return ""
    highest = best_mean(found for _, found in trained)
    names = [group.name for group, found in trained if found.mean == highest]
    best = next(found for _, found in trained if found.mean == highest)
    said = f"{names[0]} is best with" if len(names) == 1 else f"{', '.join(names)} tie with"
    if len(trained) == 1:
        said = f"{names[0]} reaches"
    line = f"{title(task)}: {said} {_show_measured(best)} {best.label}"
    beside = []
    if (chance := chances(groups).get(task)) is not None:
        beside.append(f"chance is {_show_value(best.scale * chance, best.unit)}")
    untrained = [found for group, found in scored if group.settings.optimisation.epochs == 0]
    if untrained:
        level = best_mean(untrained)
        beside.append(f"without pretraining it is {_show_measured(next(u for u in untrained if u.mean == level))}")
    return f"{line}; {', and '.join(beside)}." if beside else f"{line}."


def _show_measured(found: Measured) -> str:
    """`60.0 % [40.0, 80.0]`, or over seeds `60.0 ± 2.0 %`."""
    if found.deviation is not None:
        return f"{found.scale * found.mean:.1f}\u00a0±\u00a0{_show_value(found.scale * found.deviation, found.unit)}"
    return _show_value(found.scale * found.mean, found.unit) + _interval(found.interval, found.scale)


def _show_value(value: float, unit: str) -> str:
    return f"{value:.1f}\u00a0{unit}" if unit else f"{value:.1f}"


def _interval(interval: tuple[float, float] | None, scale: float = 100.0) -> str:
    return "" if interval is None else f" [{scale * interval[0]:.1f}, {scale * interval[1]:.1f}]"


def _comparable(rows: Sequence[MaskQualityRow], ratio: float, source: str | None) -> list[MaskQualityRow]:
    """Masks of one ratio, those by text from one caption source only: the one used in training, or the first."""
    same = [row for row in rows if row.ratio == ratio]
    sources = list(dict.fromkeys(row.source for row in same if row.source))
    chosen = source if source in sources else next(iter(sources), "")
    return [row for row in same if row.source in ("", chosen)]


def _masks(camera: str, rows: Sequence[MaskQualityRow]) -> str:
    """How masks of the same ratio compare for one kind of camera."""
    found = [row for row in rows if row.camera == camera]
    if not found:
        return ""
    parts = ", ".join(
        f"{replace(row, dataset='').name} {100 * row.coverage:.1f}\u00a0%{_interval(row.interval)}" for row in found
    )
    chance = sorted({round(100 * row.chance) for row in found})
    level = " to ".join(str(value) for value in (chance if len(chance) < 3 else [chance[0], chance[-1]]))
    where = f"{found[0].dataset}: with" if found[0].dataset else "With"
    return (
        f"{where} a {camera} camera, masks of ratio {found[0].ratio:g} hide this share of the named object: {parts}; "
        f"chance is {level}\u00a0%."
    )


def faithfulness(results: Results) -> str:
    """How true the maps stay that are computed once and follow the crop; empty when it was not measured."""
    found = results.faithfulness
    if found is None:
        return ""
    low, high = found.interval
    return (
        f"Maps are computed once on the full frame and follow the crop. On {found.crops} random crops, text-guided masks "
        f"of ratio {found.ratio:g} from such maps and from maps computed on the crop itself overlap with an intersection "
        f"over union of {found.iou:.3f} [{low:.3f}, {high:.3f}]; two random masks reach {found.chance:.3f}."
    )


def study_facts(study: Study, provenance: Provenance) -> list[tuple[str, str]]:
    """What was run, in short: what concerns all datasets; of one dataset, all."""
    config = study.config
    lines = [("Results", config.name)]
    if study.several:
        lines += [("Datasets", ", ".join(config.dataset_names))]
    else:
        lines += dataset_facts(config)
    lines += [("Pretraining", line) for line in dict.fromkeys(_describe(run) for run in config.pretrain.values())]
    seeds = sorted({run.seed for run in config.runs.values() if run.seed is not None} | {config.seed})
    lines += [("Seed" if len(seeds) == 1 else "Seeds", ", ".join(map(str, seeds)))]
    if provenance.versions:
        lines.append(("Versions", ", ".join(f"{name} {version}" for name, version in provenance.versions.items())))
    return [(name, value) for name, value in lines if value]


def dataset_facts(config: Config) -> list[tuple[str, str]]:
    """What was made of one dataset's videos, in short; `config` is that of the dataset alone."""
    data, frames, pack = config.dataset, config.frames, config.pack
    assert data is not None, "the config is that of one dataset"
    named = {"moving-shapes": "moving-shapes, generated", "folder": "folder of videos"}
    packed = {
        "similarity": pack.similarity and bool(pack.sources),
        "motion": pack.motion,
        "flow": pack.flow,
        "text vectors": pack.text,
    }
    made = list(config.captions if config.mask_quality else pack.sources)
    captions = ", ".join(made) + (f"; {', '.join(pack.sources)} for training" if pack.sources else "")
    lines = [
        ("Dataset", named.get(data.source, data.source)),
        ("Frames", f"{_every(frames.every)} frame, short side {frames.short_side} px, JPEG quality {frames.quality}"),
        ("Captions", captions if made != list(pack.sources) else ", ".join(made) or "none"),
        ("Similarity", config.similarity.model if packed["similarity"] or config.mask_quality else ""),
        ("Motion", config.motion.backend + (", camera subtracted" if config.motion.subtract_camera else "")),
        ("Flow", config.flow.backend if pack.flow else ""),
        ("Text", config.text.model if pack.text else ""),
        ("Packed", ", ".join(name for name, is_packed in packed.items() if is_packed) or "frames only"),
    ]
    if not (pack.motion or config.mask_quality):
        lines = [line for line in lines if line[0] != "Motion"]
    return [(name, value) for name, value in lines if value]


def _describe(run: PretrainRun | LanguageRun) -> str:
    size = f"{run.frames} frames of {run.image_size} x {run.image_size} px, {_every(run.stride)} stored frame"
    return f"{run.method}, {run.model} ViT; {size}; tubelets of {run.tubelet} x {run.patch_size} x {run.patch_size}"


def _every(step: int) -> str:
    """`every`, `every 2nd`, `every 11th`."""
    if step == 1:
        return "every"
    ending = "th" if step % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(step % 10, "th")
    return f"every {step}{ending}"


def splits_table(study: Study) -> Table:
    """Clips of each split, of all datasets."""
    first = ["Dataset"] if study.several else []
    rows = []
    for dataset in study.datasets:
        name = [words(dataset.name)] if study.several else []
        rows += [
            [*name, words(s.name), count(s.listed), count(s.kept), count(s.packed)] for s in dataset.results.splits
        ]
    columns = [*first, "Split", "Listed", "Kept", "Packed"]
    return Table("splits", columns, [column.lower() for column in columns], rows)


def models_table(provenance: Provenance) -> Table:
    rows = [[words(m.stage), words(m.name), words(m.sha256)] for m in provenance.models]
    return Table("models", ["Stage", "Model", "SHA-256"], ["stage", "model", "sha256"], rows)


def stages_table(stages: Sequence[StageUse]) -> Table:
    """Time used and planned; the sum below."""
    keys = ["stage", "jobs", "seconds", "cpu_seconds", "memory_mb", "planned_jobs", "planned_cpu_seconds"]
    columns = ["Stage", "Jobs", "Time of jobs", "Core time", "Peak memory", "Planned jobs", "Planned core time"]
    gpu = any(stage.planned_gpu_seconds for stage in stages)
    if gpu:
        columns += ["or GPU time", "with loading"]
        keys += ["planned_gpu_seconds", "planned_loading_seconds"]
    rows = [_stage_row(stage, gpu) for stage in stages]
    total = StageUse(
        "all",
        **{name: _total(stages, name) for name in ("jobs", "planned_jobs")},
        **{
            name: _total(stages, name)
            for name in ("seconds", "cpu_seconds", *(f"planned_{kind}_seconds" for kind in ("cpu", "gpu", "loading")))
        },
    )
    return Table("stages", columns, keys, rows, [_stage_row(total, gpu)])


def _total(stages: Sequence[StageUse], name: str) -> Any:
    known = [getattr(stage, name) for stage in stages if getattr(stage, name) is not None]
    return sum(known) if known else None


def _stage_row(stage: StageUse, gpu: bool) -> list[Cell]:
    row = [words(stage.name), count(stage.jobs), _time(stage.seconds), _time(stage.cpu_seconds), _memory(stage.memory)]
    row += [count(stage.planned_jobs), _time(stage.planned_cpu_seconds)]
    more = [_time(stage.planned_gpu_seconds or None), _time(stage.planned_loading_seconds or None)]
    return row + more if gpu else row


def _time(seconds: float | None) -> Cell:
    if seconds is None:
        return number(None, 0)
    text = f"{seconds:.1f}s" if seconds < 10 else format_seconds(seconds)
    return Cell(text, (seconds,), numeric=True)


def _memory(megabytes: float | None) -> Cell:
    if megabytes is None:
        return number(None, 0)
    text = f"{megabytes / 1024:.1f} GB" if megabytes >= 1024 else f"{megabytes:.0f} MB"
    return Cell(text, (megabytes,), numeric=True)


def caption_sections(config: Config, results: Results) -> Iterator[dict[str, Any]]:
    """Per source: what it is, what it yielded, examples."""
    for found in results.captions:
        source = config.captions[found.source]
        summary = f"{found.captions} captions, {found.distinct} different, of {found.clips} clips; "
        summary += f"{found.failed} clips without any ({100 * found.failed_share:.1f}\u00a0%)"
        yield {"source": found.source, "kind": _kind(source), "summary": summary, "examples": found.examples}


def _kind(source: Any) -> str:
    if isinstance(source, Blip2Captions):
        return f"BLIP-2, {source.key_frames} key frames a clip, {source.model}"
    if isinstance(source, HumanCaptions):
        return "from the dataset"
    if isinstance(source, LabelCaptions):
        return "templates with the action label"
    return f"language model, {source.model}"


def count_statuses(results: Results) -> str:
    """`frames: 3 truncated, 1 timeout (2 dropped); ...`"""
    stages: dict[str, Counter[str]] = {}
    dropped: Counter[str] = Counter()
    for refusal in results.refusals:
        stages.setdefault(refusal.stage, Counter())[refusal.status] += 1
        dropped[refusal.stage] += not refusal.kept
    parts = []
    for stage, counts in stages.items():
        listed = ", ".join(f"{n} {status}" for status, n in sorted(counts.items()))
        parts.append(f"{stage}: {listed} ({dropped[stage]} dropped)")
    return "; ".join(parts)


def show_receipts(provenance: Provenance) -> list[tuple[str, str]]:
    return [(stage, json.dumps(receipt, indent=2, sort_keys=True)) for stage, receipt in provenance.receipts.items()]
