"""The page's text and small tables: setup, clips, models, time, captions and refused clips."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from stm.config import (
    Blip2Captions,
    Config,
    Frames,
    HumanCaptions,
    LabelCaptions,
    LanguageRun,
    PretrainRun,
    VisionLanguageCaptions,
)
from stm.datasets import official_clips
from stm.jobs.progress import format_seconds
from stm.jobs.status import Status
from stm.report.comparison import beat_reference, list_names
from stm.report.results.provenance import Provenance, StageUse
from stm.report.results.records import DatasetResults, Results, RunGroup, Study
from stm.report.tables import Cell, Table, compare_runs, count, number, text_cell, title


def chances(groups: Sequence[RunGroup]) -> dict[str, float]:
    """Return each evaluation's chance level, if it has results; omits those without a level, such as captioning."""
    runs = [run for group in groups for run in group.instances]
    levels = {task: entry.headline.chance for run in reversed(runs) for task, entry in run.evaluations.items()}
    return {task: chance for task, chance in levels.items() if chance is not None}


def introduce(study: Study, groups: Sequence[RunGroup]) -> list[str]:
    """Return the page's first sentences: the data, the runs, and what the intervals show about pretraining."""
    sentences = [line for dataset in study.datasets if (line := _count_clips(dataset, study.several))]
    if groups:
        sentences.append(_count_runs(study.config, groups))
    return sentences + _summarise_evaluations(study.config, groups)


def _count_runs(config: Config, groups: Sequence[RunGroup]) -> str:
    """Count the runs, and name the untrained ones: those that are evaluated serve for comparison, others are only drawn."""
    evaluated = {run for task in config.evaluate for run in config.runs_of(task)}
    untrained = [group.name for group in groups if group.untrained]
    compared = [name for name in untrained if name in evaluated]
    drawn = [name for name in untrained if name not in evaluated]
    parts = [f"{list_names(compared)}, for comparison"] if compared else []
    parts += [f"{list_names(drawn)}, only drawn"] if drawn else []
    runs = f"{len(groups)} pretraining run{'s' if len(groups) > 1 else ''}"
    return f"{runs} (untrained: {'; '.join(parts)})." if parts else f"{runs}."


def _count_clips(dataset: DatasetResults, several: bool) -> str:
    splits = [f"{split.listed:,} {split.name}" for split in dataset.results.splits if split.listed]
    return f"{dataset.name}: {' and '.join(splits)} clips." if splits else ""


def _summarise_evaluations(config: Config, groups: Sequence[RunGroup]) -> list[str]:
    """Say in which evaluations a pretrained run is better than the untrained network, or than chance without one."""
    better: dict[str, list[str]] = {}
    for task in config.evaluate:
        for entries in compare_runs(config, groups, task).values():
            reference, names = beat_reference(entries)
            if reference:
                better.setdefault(reference, [])
                better[reference] += [f"{title(task)} ({', '.join(names)})"] if names else []
    return [
        f"Better than {reference}, with 95\u00a0% intervals apart: {'; '.join(where)}."
        if where
        else f"No pretrained run is better than {reference} with 95\u00a0% intervals apart."
        for reference, where in better.items()
    ]


def reconstructions(groups: Sequence[RunGroup]) -> str:
    """Say where the colours of the runs' reconstructions come from, by the targets that the runs predict."""
    targets = {group.settings.reconstruction.target for group in groups if isinstance(group.settings, PretrainRun)}
    said = "Reconstructions keep the visible patches."
    if "normalised" in targets:
        whose = "Predicted patches" if len(targets) == 1 else "Patches predicted by runs with normalised targets"
        said += (
            f" {whose} take their mean and contrast from the true pixels, because the targets are normalised patches; "
            "even an untrained model gets their colours right."
        )
    if "pixels" in targets:
        whose = "Predicted patches" if len(targets) == 1 else "The others"
        said += f" {whose} are shown as predicted: nothing of the hidden pixels is given."
    return said


def crop_agreement(results: Results, dataset: str = "") -> str:
    """Describe the agreement of masks from cached maps with masks from maps of the crop; empty if not measured.

    Args:
        dataset: its name, where the page shows several datasets.
    """
    agreement = results.crop_agreement
    if agreement is None:
        return ""
    low, high = agreement.interval
    smaller = (
        f" ({agreement.smaller_iou:.3f} on the {agreement.smaller_crops} of them with less than 0.85 of the largest "
        "square's area)"
        if agreement.smaller_iou is not None
        else ""
    )
    return (
        f"Similarity maps{f' of {dataset}' if dataset else ''} are cached for the full frame and cropped in training. On "
        f"{agreement.crops} random crops, text-guided masks of ratio {agreement.ratio:g} from cropped maps and from maps "
        f"recomputed on the crop have an intersection over union of {agreement.iou:.3f} [{low:.3f}, {high:.3f}]{smaller}; "
        f"for two random masks it is {agreement.chance:.3f}."
    )


def study_facts(study: Study, provenance: Provenance) -> list[tuple[str, str]]:
    """List the study's setup as (name, value) pairs; includes the dataset's facts if there is only one dataset."""
    config = study.config
    lines = [("Name", config.name)]
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
    """List the setup of one dataset as (name, value) pairs; `config` is the dataset's own config."""
    data, frames, pack = config.dataset, config.frames, config.pack
    assert data is not None, "the config is that of one dataset"
    titles = {"moving-shapes": "moving-shapes, generated", "folder": "folder of videos"}
    arrays = {array.name for array in pack.arrays}
    # In the order of the config's keys.
    packed = ["text vectors" if name == "text" else name for name in type(pack).model_fields if name in arrays]
    # Mask quality compares all caption sources; without it, only the packed sources are generated.
    sources = list(config.captions if config.mask_quality else pack.sources)
    captions = ", ".join(sources) + (f"; {', '.join(pack.sources)} for training" if pack.sources else "")
    lines = [
        ("Dataset", titles.get(data.source, data.source)),
        ("Frames", f"{_stored(frames)}, short side {frames.short_side} px, JPEG quality {frames.quality}"),
        ("Captions", captions if sources != list(pack.sources) else ", ".join(sources) or "none"),
        ("Similarity", config.similarity.model if "similarity" in packed or config.mask_quality else ""),
        ("Motion", config.motion.backend + (", camera subtracted" if config.motion.subtract_camera else "")),
        ("Flow", config.flow.backend if pack.flow else ""),
        ("Text", config.text.model if pack.text else ""),
        ("Packed", ", ".join(packed) or "frames only"),
    ]
    if not (pack.motion or config.mask_quality):
        lines = [line for line in lines if line[0] != "Motion"]
    return [(name, value) for name, value in lines if value]


def _describe(run: PretrainRun | LanguageRun) -> str:
    size = f"{run.frames} frames of {run.image_size} x {run.image_size} px, {_every(run.stride)} stored frame"
    return f"{run.method}, {run.model} ViT; {size}; tubelets of {run.tubelet} x {run.patch_size} x {run.patch_size}"


def _every(step: int) -> str:
    """Format a step as an ordinal: `every`, `every 2nd`, `every 11th`."""
    if step == 1:
        return "every"
    ending = "th" if step % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(step % 10, "th")
    return f"every {step}{ending}"


def _stored(frames: Frames) -> str:
    """Say which frames are stored: `every 4th frame`, `16 frames per clip, in the middle of equal segments`."""
    if frames.every is None:
        return f"{frames.count} frames per clip, in the middle of equal segments"
    return f"{_every(frames.every)} frame"


def splits_table(study: Study) -> Table:
    """Build the table of clips per split for all datasets."""
    first = ["Dataset"] if study.several else []
    rows = []
    for dataset in study.datasets:
        name = [text_cell(dataset.name)] if study.several else []
        rows += [
            [*name, text_cell(s.name), count(s.listed), count(s.kept), count(s.packed)] for s in dataset.results.splits
        ]
    columns = [*first, "Split", "Listed", "Kept", "Packed"]
    return Table("splits", columns, [column.lower() for column in columns], rows)


def models_table(provenance: Provenance) -> Table:
    rows = [[text_cell(m.stage), text_cell(m.name), text_cell(m.sha256)] for m in provenance.models]
    return Table("models", ["Stage", "Model", "SHA-256"], ["stage", "model", "sha256"], rows)


def stages_table(stages: Sequence[StageUse]) -> Table:
    """Build the table of actual and planned time per stage, with the total in the footer."""
    keys = ["stage", "jobs", "seconds", "cpu_seconds", "memory_mb", "planned_jobs", "planned_cpu_seconds"]
    columns = ["Stage", "Jobs", "Time of jobs", "Core time", "Peak memory", "Planned jobs", "Planned core time"]
    gpu = any(stage.planned_gpu_seconds for stage in stages)
    if gpu:
        columns += ["Planned GPU time", "Core time of loading"]
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
    row = [
        text_cell(stage.name),
        count(stage.jobs),
        _time(stage.seconds),
        _time(stage.cpu_seconds),
        _memory(stage.memory),
    ]
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
    """Yield the kind, counts and examples of each caption source."""
    for summary in results.captions:
        kind = _kind(config.captions[summary.source])
        counts = f"{summary.captions} captions, {summary.distinct} distinct, for {summary.clips} clips; "
        counts += f"{summary.failed} clips without captions ({100 * summary.failed_share:.1f}\u00a0%)"
        yield {"source": summary.source, "kind": kind, "counts": counts, "examples": summary.examples}


def _kind(source: Any) -> str:
    if isinstance(source, Blip2Captions):
        return f"BLIP-2, {source.key_frames} key frames per clip, {source.model}"
    if isinstance(source, HumanCaptions):
        return "from the dataset"
    if isinstance(source, LabelCaptions):
        return "templates filled with the action label"
    if isinstance(source, VisionLanguageCaptions):
        return f"vision-language model, {source.frames} frames per clip ({source.input}), {source.model}"
    return f"language model, {source.model}"


def count_statuses(results: Results) -> str:
    """Count refused clips per stage and status: `frames: 3 truncated, 1 timeout (2 dropped); ...`"""
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


def describe_copy(dataset: DatasetResults) -> str:
    """Compare the clips of a public dataset with its official lists; empty for other datasets and without a manifest."""
    assert dataset.config.dataset is not None, "the config is that of one dataset"
    official = sum(official_clips(dataset.config.dataset).values())
    listed = sum(split.listed for split in dataset.results.splits)
    if not official or not listed:
        return ""
    refused = [refusal for refusal in dataset.results.refusals if refusal.stage == "manifest" and not refusal.kept]
    missing = sum(refusal.status == Status.MISSING_FILE for refusal in refused)
    return (
        f"Of {official:,} official clips, {listed:,} are in the manifest; {missing:,} have no file in this copy, and "
        f"{len(refused) - missing:,} were refused for other reasons."
    )


def show_receipts(provenance: Provenance) -> list[tuple[str, str]]:
    """Return each stage with its receipt as indented JSON."""
    return [(stage, json.dumps(receipt, indent=2, sort_keys=True)) for stage, receipt in provenance.receipts.items()]
