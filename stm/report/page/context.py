"""The page template's context, as plain values."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from markupsafe import Markup

from stm.config import Config
from stm.config.study import STAGE_KEYS
from stm.report import figures, tables
from stm.report.clips import film_strips
from stm.report.clips.draw import MAPS, ClipStrips, reconstructed_runs
from stm.report.clips.film_strips import Row
from stm.report.clips.gallery import MaskGallery, ordered_strategies
from stm.report.clips.run_masks import draws_own_mask, learns_mask
from stm.report.expectations import count_outcomes
from stm.report.html import data_url, to_markup
from stm.report.page import sentences, terms
from stm.report.results.provenance import Provenance, describe_environment, find_config_file
from stm.report.results.records import DatasetResults, RunGroup, Study
from stm.report.tables import Table

# Larger tables slow down the browser; the CSV files contain all rows.
MAX_REFUSALS = 300  # rows of the table of refused clips
MAX_CLASS_CELLS = 6000  # cells of the per-class accuracy table
MAX_EVALUATIONS = 5  # columns of a results table; with more, there is one table per set of runs

# The rule of `stm.report.comparison.clear_best` and the interval of `over_seeds`, in words.
BOLD_RULE = "Bold: better than chance, than every untrained run and than every other row, with 95\u00a0% intervals wholly apart."
MASK_RULE = "Bold: better than chance and than every other mask of its ratio, with 95\u00a0% intervals wholly apart."
SEEDS_RULE = (
    "the interval of several seeds is Student's t interval of their mean, and at least as wide as that of one seed."
)

COMMANDS = """\
snakemake plan --cores all --configfile {file}   # estimate the cost
snakemake --cores all --configfile {file}        # run every stage, up to this page
stm report --config {file}                       # rebuild this page from existing results"""


def make_context(
    study: Study,
    groups: Sequence[RunGroup],
    provenance: Provenance,
    built: Mapping[str, Table],
    charts: Mapping[str, Markup],
    clips: Mapping[str, Sequence[ClipStrips]],
    masks: Mapping[str, MaskGallery],
) -> dict[str, Any]:
    """Build the context, except for the config's tables and figures and the list of problems."""
    config = study.config
    config_file = find_config_file(config)
    cells = len(built["per_class"].rows) * len(built["per_class"].columns)
    return {
        "title": config.report.title,
        "introduction": sentences.introduce(study, groups),
        "expectations": built["expectations"],
        "expectation_counts": count_outcomes(built["expectations"]),
        "several": study.several,
        "sections": number_sections(config),
        "facts": sentences.study_facts(study, provenance),
        "datasets": [show_dataset(dataset, study.several) for dataset in study.datasets],
        "splits": sentences.splits_table(study),
        "without_clips": [dataset.name for dataset in study.datasets if not dataset.results.splits],
        "models": sentences.models_table(provenance),
        "stages": sentences.stages_table(provenance.stages),
        "has_plan": any(s.planned_jobs is not None for s in provenance.stages),
        "has_times": any(s.seconds is not None for s in provenance.stages),
        "results": split_results(config, groups),
        "evaluated": any(run.evaluations for group in groups for run in group.instances),
        "several_seeds": any(len(group.instances) > 1 for group in groups),
        "per_class": built["per_class"] if cells <= MAX_CLASS_CELLS else None,
        "loss_charts": [chart for name, chart in charts.items() if name.startswith("loss-")],
        "loss_runs": [
            {"label": figures.name_run(group), "swatch": figures.swatch(group.number)}
            for group in groups
            if any(run.losses for run in group.instances)
        ],
        **_describe_curves(groups),
        "runs_without_losses": [group.name for group in groups if not any(run.losses for run in group.instances)],
        "shows_clips": config.report.clips > 0,
        "reconstructions": sentences.reconstructions([groups[number] for number in reconstructed_runs(groups)]),
        "has_boxes": any(strips.clip.boxes is not None for of_dataset in clips.values() for strips in of_dataset),
        "own_masks": any(draws_own_mask(group.settings) for group in groups),
        "learned_masks": any(learns_mask(group.settings) for group in groups),
        "strips_by_dataset": [show_clips(d, groups, clips[d.name], masks[d.name], study.several) for d in study.shown],
        "colormap": to_markup(", ".join(film_strips.colormap_stops())),
        "quality": built["mask_quality"],
        "quality_chart": charts.get("quality"),
        "crop_agreement": [
            line
            for dataset in study.datasets
            if (line := sentences.crop_agreement(dataset.results, dataset.name if study.several else ""))
        ],
        "bold_rule": BOLD_RULE,
        "mask_rule": MASK_RULE,
        "seeds_rule": SEEDS_RULE,
        "commands": COMMANDS.format(file=shlex.quote(str(config_file or "config.yaml"))),
        "config_file": "" if config_file is None else str(config_file),
        "environment": describe_environment(),
        "terms": explain_terms(config, groups, built["mask_quality"].rows != []),
        "config_yaml": dump_config(config),
        "receipts": sentences.show_receipts(provenance),
    }


def _describe_curves(groups: Sequence[RunGroup]) -> dict[str, bool]:
    """Report whether the loss chart shows bands over seeds, and whether it shows logged values of single-seed runs."""
    seeds = [sum(bool(run.losses) for run in group.instances) for group in groups]
    few_runs = sum(count > 0 for count in seeds) <= figures.MAX_FAINT
    return {"has_bands": any(count > 1 for count in seeds), "has_logged_values": few_runs and 1 in seeds}


def explain_terms(config: Config, groups: Sequence[RunGroup], measures_masks: bool) -> dict[str, terms.Terms]:
    """Return the terms to explain, by the id of the section that uses them."""
    tasks = list(dict.fromkeys(task.task for task in config.evaluate.values()))
    scores = [score for group in groups for task in config.evaluate if (score := group.score(task))]
    general = ["chance"] * any(score.chance is not None for score in scores)
    general += ["untrained"] * any(group.untrained for group in groups)
    general += ["interval"] * any(score.interval is not None for score in scores)
    general += ["final_loss"] * any(group.final_loss is not None for group in groups)
    return {
        "results": terms.pick(terms.TASKS, tasks)
        + terms.pick(terms.METRICS, (score.label for score in scores))
        + terms.pick(terms.RESULTS, general),
        "masks": [*terms.MASKS.values(), *terms.pick(terms.STRATEGIES, ordered_strategies())],
        "quality": list(terms.QUALITY.values()) if measures_masks else [],
        "losses": terms.explain_objectives(figures.find_objectives(groups)),
    }


def number_sections(config: Config) -> dict[str, tuple[int, str]]:
    """Return the number and title of each section, by section id."""
    titles = {"expectations": "Expected, and what came out"} if config.report.expect else {}
    titles |= {"config_results": "Tables and figures"} if config.tables or config.figures else {}
    titles |= {
        "results": "Results",
        "masks": "Masks",
        "clips": "Clips and reconstructions",
        "quality": "Mask quality",
        "losses": "Losses",
        "setup": "Setup",
        "input": "Captions and refused clips",
        "time": "Time",
        "reproduce": "Reproduce",
    }
    return {name: (number, title) for number, (name, title) in enumerate(titles.items(), start=1)}


def split_results(config: Config, groups: Sequence[RunGroup]) -> list[dict[str, Any]]:
    """Build the results as one table or, with many evaluations, as one table per set of runs that share evaluations."""
    chances = sentences.chances(groups)
    if len(config.evaluate) <= MAX_EVALUATIONS:
        parts = [(list(groups), list(config.evaluate))]
    else:
        tasks_by_runs: dict[tuple[str, ...], list[str]] = {}
        for task in config.evaluate:
            tasks_by_runs.setdefault(tuple(config.runs_of(task)), []).append(task)
        parts = [([g for g in groups if g.name in runs], tasks) for runs, tasks in tasks_by_runs.items()]
        not_evaluated = [g for g in groups if not any(g.name in runs for runs in tasks_by_runs)]
        parts += [(not_evaluated, [])]
    return [
        {
            "table": tables.results_table(config, members, chances, tasks),
            "swatches": [figures.swatch(group.number) for group in members],
        }
        for members, tasks in parts
        if members
    ]


def show_dataset(dataset: DatasetResults, several: bool) -> dict[str, Any]:
    """Build the context of a dataset's setup, captions and refused clips."""
    refusals = dataset.results.refusals
    return {
        "name": dataset.name if several else "",
        "facts": sentences.dataset_facts(dataset.config) if several else [],
        "captions": list(sentences.caption_sections(dataset.config, dataset.results)),
        "quarantine": tables.quarantine_table(refusals[:MAX_REFUSALS]),
        "hidden_refusals": max(0, len(refusals) - MAX_REFUSALS),
        "statuses": sentences.count_statuses(dataset.results),
        "completeness": sentences.describe_copy(dataset),
    }


def show_clips(
    dataset: DatasetResults,
    groups: Sequence[RunGroup],
    clips: Sequence[ClipStrips],
    gallery: MaskGallery,
    several: bool,
) -> dict[str, Any]:
    """Build the context of a dataset's clips and of the masks on them."""
    rows = [row for clip in clips for row in clip.rows]
    maps = {row.label for row in rows if row.kind == "map"}
    slots = max((len(row.tiles) for row in rows), default=1)
    masks = [clip for clip in gallery.clips if len(clip.rows) > 1]
    runs = dataset.own_groups(groups)
    return {
        "name": dataset.name,
        "dataset": dataset.name if several else "",
        "clips": [_show(clip) for clip in clips],
        "split": clips[0].clip.split if clips else "",
        "slots": slots,
        "skips_slots": any(run.settings.frames // run.settings.tubelet > slots for run in runs),
        "has_boxes": any(clip.clip.boxes is not None for clip in clips),
        "has_reconstructions": any(row.kind == "reconstruction" for row in rows),
        "reconstructed_runs": len(reconstructed_runs(runs)),
        "runs_with_weights": sum(group.instances[0].weights is not None for group in runs),
        "missing_guides": [label for label, _ in MAPS.values() if label not in maps],
        "masks": [_show(clip) for clip in masks],
        "mask_slots": max((len(row.tiles) for clip in masks for row in clip.rows), default=1),
        "missing_masks": [f"{strategy} ({reason})" for strategy, reason in gallery.missing.items()],
    }


def _show(strips: ClipStrips) -> dict[str, Any]:
    clip = strips.clip
    camera = f"{clip.camera} camera" if clip.camera else ""
    return {
        "name": clip.video_id,
        "about": ", ".join(filter(None, (clip.label, camera))),
        "caption": strips.caption,
        "other_captions": [caption for caption in dict.fromkeys(clip.captions) if caption != strips.caption],
        "rows": [_show_row(row) for row in strips.rows],
    }


def _show_row(row: Row) -> dict[str, Any]:
    scale = row.scale and {"low": f"{row.scale.low:.2f}", "high": f"{row.scale.high:.2f}", "unit": row.scale.unit}
    return {
        "kind": row.kind,
        "label": row.label,
        "note": row.note,
        "swatch": None if row.run is None else figures.swatch(row.run),
        "scale": scale,
        "tiles": len(row.tiles),
        "image": data_url(*film_strips.encode(row.tiles)),
    }


def dump_config(config: Config) -> str:
    """Dump the config as YAML without defaults; parsing the YAML yields an equal config."""
    values = config.model_dump(mode="json", exclude_defaults=True)
    if config.datasets:
        # Each dataset has already inherited the sections next to `datasets`. If written again, they would override any
        # section that a dataset resets to its default, because defaults are omitted.
        values = {key: value for key, value in values.items() if key not in STAGE_KEYS}
    first = {key: values[key] for key in ("name", "results", "seed", "seeds", "dataset") if key in values}
    return str(yaml.safe_dump(first | values, sort_keys=False, allow_unicode=True, width=100))
