"""What the page says in words and small tables: findings, facts of the setup, time, captions, refusals."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from stm.config import Blip2Captions, Config, HumanCaptions, LabelCaptions, MovingShapesDataset, PretrainRun
from stm.progress import format_seconds
from stm.report.records import Evaluation, MaskQualityRow, Results, Run
from stm.report.stages import Provenance, Stage
from stm.report.tables import Cell, Table, count, number, title, words


def findings(config: Config, results: Results) -> list[str]:
    """The few numbers that a reader looks for first, in sentences."""
    lines = [_best_run(task, results.runs) for task in config.evaluate]
    if config.mask_quality is not None:
        compared = _comparable(results.mask_quality, config.mask_quality.text_ratio, config.pack.captions)
        lines += [_masks(camera, compared) for camera in ("fixed", "moving")]
    return [line for line in lines if line]


def _best_run(task: str, runs: Sequence[Run]) -> str:
    scored = [(run, run.evaluations[task]) for run in runs if task in run.evaluations]
    trained = [entry for entry in scored if entry[0].settings.optimisation.epochs > 0]
    if not trained:
        return ""
    found = max((entry[1] for entry in trained), key=lambda evaluation: evaluation.top1)
    names = [run.name for run, evaluation in trained if evaluation.top1 == found.top1]
    best = f"{names[0]} is best" if len(names) == 1 else f"{', '.join(names)} tie"
    line = f"{title(task)}: {best} with {_accuracy(found)} top-1; chance is {100 * found.chance:.1f}\u00a0%"
    untrained = [f for run, f in scored if run.settings.optimisation.epochs == 0]
    if untrained:
        line += f", and without pretraining it is {_accuracy(max(untrained, key=lambda f: f.top1))}"
    return f"{line}."


def _accuracy(found: Evaluation) -> str:
    return f"{100 * found.top1:.1f}\u00a0%{_interval(found.interval)}"


def _interval(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f" [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"


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
    parts = ", ".join(f"{row.name} {100 * row.coverage:.1f}\u00a0%{_interval(row.interval)}" for row in found)
    chance = sorted({round(100 * row.chance) for row in found})
    level = " to ".join(str(value) for value in (chance if len(chance) < 3 else [chance[0], chance[-1]]))
    return (
        f"With a {camera} camera, masks of ratio {found[0].ratio:g} hide this share of the named object: {parts}; "
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


def facts(config: Config, provenance: Provenance) -> list[tuple[str, str]]:
    """What was run, in short."""
    data, frames, pack = config.dataset, config.frames, config.pack
    origin = "generated" if isinstance(data, MovingShapesDataset) else "folder of videos"
    packed = [
        name
        for name, is_packed in (("similarity", pack.similarity and pack.captions), ("motion", pack.motion))
        if is_packed
    ]
    lines = [
        ("Results", config.name),
        ("Dataset", f"{data.source}, {origin}" if data.source != "folder" else origin),
        ("Frames", f"{_every(frames.every)} frame, short side {frames.short_side} px, JPEG quality {frames.quality}"),
        (
            "Captions",
            ", ".join(config.captions) + (f"; {pack.captions} for training" if pack.captions else "") or "none",
        ),
        ("Similarity", config.similarity.model),
        ("Motion", config.motion.backend + (", camera subtracted" if config.motion.subtract_camera else "")),
        ("Guides packed", " and ".join(packed) or "none"),
        *(("Pretraining", line) for line in dict.fromkeys(_describe(run) for run in config.pretrain.values())),
        ("Seed", str(config.seed)),
    ]
    if provenance.versions:
        lines.append(("Versions", ", ".join(f"{name} {version}" for name, version in provenance.versions.items())))
    return [(name, value) for name, value in lines if value]


def _describe(run: PretrainRun) -> str:
    size = f"{run.frames} frames of {run.image_size} x {run.image_size} px, {_every(run.stride)} stored frame"
    return f"{run.method}, {run.model} ViT; {size}; tubelets of {run.tubelet} x {run.patch_size} x {run.patch_size}"


def _every(step: int) -> str:
    """`every`, `every 2nd`, `every 11th`."""
    if step == 1:
        return "every"
    ending = "th" if step % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(step % 10, "th")
    return f"every {step}{ending}"


def splits_table(results: Results) -> Table:
    rows = [[words(s.name), count(s.listed), count(s.kept), count(s.packed)] for s in results.splits]
    return Table("splits", ["Split", "Listed", "Kept", "Packed"], ["split", "listed", "kept", "packed"], rows)


def models_table(provenance: Provenance) -> Table:
    rows = [[words(m.stage), words(m.name), words(m.sha256)] for m in provenance.models]
    return Table("models", ["Stage", "Model", "SHA-256"], ["stage", "model", "sha256"], rows)


def stages_table(stages: Sequence[Stage]) -> Table:
    """Time used and planned; the sum below."""
    keys = ["stage", "jobs", "seconds", "cpu_seconds", "memory_mb", "planned_jobs", "planned_cpu_seconds"]
    columns = ["Stage", "Jobs", "Time of jobs", "Core time", "Peak memory", "Planned jobs", "Planned core time"]
    gpu = any(stage.planned_gpu_seconds for stage in stages)
    if gpu:
        columns, keys = [*columns, "or GPU time"], [*keys, "planned_gpu_seconds"]
    rows = [_stage_row(stage, gpu) for stage in stages]
    total = Stage(
        "all",
        **{name: _total(stages, name) for name in ("jobs", "planned_jobs")},
        **{
            name: _total(stages, name)
            for name in ("seconds", "cpu_seconds", "planned_cpu_seconds", "planned_gpu_seconds")
        },
    )
    return Table("stages", columns, keys, rows, [_stage_row(total, gpu)])


def _total(stages: Sequence[Stage], name: str) -> Any:
    known = [getattr(stage, name) for stage in stages if getattr(stage, name) is not None]
    return sum(known) if known else None


def _stage_row(stage: Stage, gpu: bool) -> list[Cell]:
    row = [words(stage.name), count(stage.jobs), _time(stage.seconds), _time(stage.cpu_seconds), _memory(stage.memory)]
    row += [count(stage.planned_jobs), _time(stage.planned_cpu_seconds)]
    return [*row, _time(stage.planned_gpu_seconds or None)] if gpu else row


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
