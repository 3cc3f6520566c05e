"""All that the page's template speaks of, as plain values."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from markupsafe import Markup

from stm.config import Config
from stm.config.study import STAGE_KEYS
from stm.report import figures, tables
from stm.report.clips import film_strips
from stm.report.clips.draw import MAPS, ClipPicture, painted_runs
from stm.report.clips.film_strips import Row
from stm.report.clips.gallery import MaskGallery
from stm.report.clips.run_masks import draws_own_mask, learns_mask
from stm.report.page import sentences
from stm.report.page.own_tables import data_address, to_markup
from stm.report.results.provenance import Provenance
from stm.report.results.records import DatasetResults, RunGroup, Study
from stm.report.tables import Table

MOST_REFUSALS = 300  # rows on the page; the CSV has them all
MOST_CELLS = 6000  # of the table of classes, likewise
MOST_EVALUATIONS = 5  # columns of one table; of more, those of the same runs stand together

COMMANDS = """\
snakemake --cores all --configfile config.yaml plan   # what it will cost
snakemake --cores all --configfile config.yaml        # everything, up to this page
stm report --config config.yaml                       # this page again, from the results that there are"""


def make_context(
    study: Study,
    groups: Sequence[RunGroup],
    provenance: Provenance,
    made: Mapping[str, Table],
    charts: Mapping[str, Markup],
    clips: Mapping[str, Sequence[ClipPicture]],
    masks: Mapping[str, MaskGallery],
) -> dict[str, Any]:
    """All but the config's own tables and figures, and the problems."""
    config = study.config
    cells = len(made["per_class"].rows) * len(made["per_class"].columns)
    return {
        "title": config.report.title,
        "several": study.several,
        "sections": number_sections(config),
        "findings": sentences.findings(study),
        "facts": sentences.study_facts(study, provenance),
        "datasets": [show_dataset(dataset, study.several) for dataset in study.datasets],
        "splits": sentences.splits_table(study),
        "without_clips": [dataset.name for dataset in study.datasets if not dataset.results.splits],
        "models": sentences.models_table(provenance),
        "stages": sentences.stages_table(provenance.stages),
        "planned": any(s.planned_jobs is not None for s in provenance.stages),
        "timed": any(s.seconds is not None for s in provenance.stages),
        "results": split_results(config, groups),
        "evaluated": any(run.evaluations for group in groups for run in group.instances),
        "seeded": any(len(group.instances) > 1 for group in groups),
        "per_class": made["per_class"] if cells <= MOST_CELLS else None,
        "loss_chart": charts.get("loss"),
        **_describe_curves(groups),
        "contrast": any(group.settings.has_contrast for group in groups),
        "silent": [group.name for group in groups if not any(run.losses for run in group.instances)],
        "wanted_clips": config.report.clips > 0,
        "boxed": any(clip.clip.boxes is not None for pictures in clips.values() for clip in pictures),
        "own_masks": any(draws_own_mask(group.settings) for group in groups),
        "learned_masks": any(learns_mask(group.settings) for group in groups),
        "shown": [show_clips(d, groups, clips[d.name], masks[d.name], study.several) for d in study.shown],
        "stops": to_markup(", ".join(film_strips.colormap_stops())),
        "quality": made["mask_quality"],
        "quality_chart": charts.get("quality"),
        "faithfulness": [line for dataset in study.datasets if (line := sentences.faithfulness(dataset.results))],
        "commands": COMMANDS,
        "config_yaml": dump_config(config),
        "receipts": sentences.show_receipts(provenance),
    }


def _describe_curves(groups: Sequence[RunGroup]) -> dict[str, bool]:
    """What the chart of losses shows: bands of several seeds, and the logged values of single ones."""
    seeds = [sum(bool(run.losses) for run in group.instances) for group in groups]
    few = sum(count > 0 for count in seeds) <= figures.MANY
    return {"banded": any(count > 1 for count in seeds), "faint": few and 1 in seeds}


def number_sections(config: Config) -> dict[str, tuple[int, str]]:
    """Number and title of each section, by its id."""
    titles = {"shown": "Tables and figures"} if config.tables or config.figures else {}
    titles |= {
        "setup": "Setup",
        "results": "Results",
        "losses": "Losses",
        "clips": "Clips",
        "masks": "Masks",
        "quality": "Mask quality",
        "input": "Captions and refused input",
        "reproduce": "Reproduce",
    }
    return {name: (number, title) for number, (name, title) in enumerate(titles.items(), start=1)}


def split_results(config: Config, groups: Sequence[RunGroup]) -> list[dict[str, Any]]:
    """The results as one table, or, of many evaluations, one for those that are done for the same runs."""
    chances = sentences.chances(groups)
    if len(config.evaluate) <= MOST_EVALUATIONS:
        parts = [(list(groups), list(config.evaluate))]
    else:
        alike: dict[tuple[str, ...], list[str]] = {}
        for task in config.evaluate:
            alike.setdefault(tuple(config.runs_of(task)), []).append(task)
        parts = [([g for g in groups if g.name in runs], tasks) for runs, tasks in alike.items()]
        rest = [g for g in groups if not any(g.name in runs for runs in alike)]
        parts += [(rest, [])] if rest else []
    return [
        {
            "table": tables.results_table(config, chosen, chances, tasks),
            "swatches": [figures.run_color(group.number) for group in chosen],
        }
        for chosen, tasks in parts
        if chosen
    ]


def show_dataset(dataset: DatasetResults, several: bool) -> dict[str, Any]:
    """What was made of a dataset's videos."""
    refusals = dataset.results.refusals
    return {
        "name": dataset.name if several else "",
        "facts": sentences.dataset_facts(dataset.config) if several else [],
        "captions": list(sentences.caption_sections(dataset.config, dataset.results)),
        "quarantine": tables.quarantine_table(refusals[:MOST_REFUSALS]),
        "hidden_refusals": max(0, len(refusals) - MOST_REFUSALS),
        "statuses": sentences.count_statuses(dataset.results),
    }


def show_clips(
    dataset: DatasetResults,
    groups: Sequence[RunGroup],
    clips: Sequence[ClipPicture],
    gallery: MaskGallery,
    several: bool,
) -> dict[str, Any]:
    """A dataset's clips, and the masks on them."""
    rows = [row for clip in clips for row in clip.rows]
    maps = {row.label for row in rows if row.kind == "map"}
    slots = max((len(row.tiles) for row in rows), default=1)
    own = {run.name for run in dataset.results.runs}
    runs = [group for group in groups if group.instances[0].name in own]
    painted = {row.run for row in rows if row.kind == "reconstruction"}
    weighty = [group for group in runs if group.instances[0].weights is not None]
    return {
        "dataset": dataset.name if several else "",
        "clips": [_show(clip) for clip in clips],
        "split": clips[0].clip.split if clips else "",
        "slots": slots,
        "subsampled": any(run.settings.frames // run.settings.tubelet > slots for run in runs),
        "boxed": any(clip.clip.boxes is not None for clip in clips),
        "painted": bool(painted),
        "chosen": len(painted_runs(runs)),
        "weighty": len(weighty),
        "missing_guides": [label for label, _ in MAPS.values() if label not in maps],
        "masks": [_show(clip) for clip in gallery.clips if len(clip.rows) > 1],
        "missing_masks": [f"{strategy} ({reason})" for strategy, reason in gallery.missing.items()],
    }


def _show(picture: ClipPicture) -> dict[str, Any]:
    clip = picture.clip
    camera = f"{clip.camera} camera" if clip.camera else ""
    return {
        "name": clip.video_id,
        "about": ", ".join(filter(None, (clip.label, camera))),
        "caption": picture.caption,
        "others": [caption for caption in dict.fromkeys(clip.captions) if caption != picture.caption],
        "rows": [_show_row(row) for row in picture.rows],
    }


def _show_row(row: Row) -> dict[str, Any]:
    scale = row.scale and {"low": f"{row.scale.low:.2f}", "high": f"{row.scale.high:.2f}", "unit": row.scale.unit}
    return {
        "kind": row.kind,
        "label": row.label,
        "note": row.note,
        "color": "" if row.run is None else figures.run_color(row.run),
        "scale": scale,
        "image": data_address(*film_strips.encode(row.tiles)),
    }


def dump_config(config: Config) -> str:
    """The config as YAML, without defaults; read again, it gives the same runs."""
    values = config.model_dump(mode="json", exclude_defaults=True)
    if config.datasets:
        # Each dataset has taken over what stands beside `datasets`. A default that a dataset holds against it would be
        # overruled when the file is read again.
        values = {key: value for key, value in values.items() if key not in STAGE_KEYS}
    first = {key: values[key] for key in ("name", "results", "seed", "seeds", "dataset") if key in values}
    return str(yaml.safe_dump(first | values, sort_keys=False, allow_unicode=True, width=100))
