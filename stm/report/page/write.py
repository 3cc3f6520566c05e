"""The report as a whole: writes the tables, the figures and one self-contained HTML page."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from matplotlib.figure import Figure

from stm.config import Config
from stm.jobs.progress import Progress
from stm.layout import Layout
from stm.report import figures, tables
from stm.report.clips import film_strips
from stm.report.clips.draw import ClipPicture, picture_clips
from stm.report.clips.gallery import MaskGallery, picture_masks
from stm.report.names import clip_name, figure_names, masks_name, table_names
from stm.report.page import context, sentences
from stm.report.page.own_tables import show_figures, show_tables, to_markup
from stm.report.results.collect import collect_study
from stm.report.results.provenance import collect_provenance
from stm.report.results.records import RunGroup, Study
from stm.report.tables import Table
from stm.storage.files import write_bytes


@dataclass
class Pictures:
    """What is drawn of the clips of each dataset that is shown."""

    clips: dict[str, list[ClipPicture]] = field(default_factory=dict)
    masks: dict[str, MaskGallery] = field(default_factory=dict)


def write_report(config: Config, layout: Layout) -> None:
    """Writes everything that `table_names` and `figure_names` promise, and the page."""
    with Progress("report", total=5, unit="parts") as progress:
        study = collect_study(config, layout)
        groups = study.groups
        provenance = collect_provenance(study, layout)
        progress.advance(note="results read")
        made = write_tables(study, groups, layout)
        progress.advance(note="tables")
        pictures = draw_pictures(study, groups)
        progress.advance(note="clips")
        charts = write_figures(study, groups, pictures, layout)
        progress.advance(note="figures")
        own = {"shown_tables": show_tables(study), "shown_figures": show_figures(study, layout)}
        found = context.make_context(study, groups, provenance, made, charts, pictures.clips, pictures.masks)
        write_bytes(layout.report, render(found | own | {"problems": study.problems}).encode())
        progress.advance(note=str(layout.report))


def write_tables(study: Study, groups: list[RunGroup], layout: Layout) -> dict[str, Table]:
    refusals = [(dataset.name, refusal) for dataset in study.datasets for refusal in dataset.results.refusals]
    names = [name for name, _ in refusals] if study.several else None
    made = {
        "results": tables.results_table(study.config, groups, sentences.chances(groups)),
        "per_class": tables.per_class_table(study.config, groups),
        "mask_quality": tables.mask_quality_table(study.mask_quality),
        "quarantine": tables.quarantine_table([refusal for _, refusal in refusals], names),
    }
    for name in table_names(study.config):
        stem, ending = name.rsplit(".", 1)
        text = made[stem].to_csv() if ending == "csv" else made[stem].to_markdown()
        write_bytes(layout.tables / name, text.encode())
    return made


def draw_pictures(study: Study, groups: list[RunGroup]) -> Pictures:
    """Clips and masks of each dataset that is shown."""
    pictures = Pictures()
    for dataset in study.shown:
        own = {run.name for run in dataset.results.runs}
        runs = [group for group in groups if group.instances[0].name in own]
        pictures.clips[dataset.name] = picture_clips(dataset.config, dataset.layout, dataset.results, runs)
        draw = partial(picture_masks, dataset.config, dataset.layout, dataset.results)
        pictures.masks[dataset.name] = dataset.results.attempt("masks", draw, MaskGallery())
    return pictures


def write_figures(study: Study, groups: list[RunGroup], pictures: Pictures, layout: Layout) -> dict[str, Markup]:
    """PNG files for all names, pictures that say so where there is nothing to show; the charts as SVG for the page."""
    drawn = {**draw_charts(study, groups), **compose_clips(study.config, pictures)}
    for name in figure_names(study.config):
        write_bytes(layout.figures / name, figures.to_png(drawn[name]))
    charts = {}
    if any(run.losses for group in groups for run in group.instances):
        runs = ", ".join(group.name for group in groups)
        charts["loss"] = to_markup(figures.to_svg(drawn["loss_curves.png"], "loss", f"Loss curves of the runs {runs}"))
    if study.mask_quality and "mask_quality.png" in drawn:
        svg = figures.to_svg(drawn["mask_quality.png"], "quality", "Mask quality by guide and camera")
        charts["quality"] = to_markup(svg)
    return charts


def draw_charts(study: Study, groups: list[RunGroup]) -> dict[str, Figure]:
    promised = figure_names(study.config)
    drawn = {}
    if "loss_curves.png" in promised:
        drawn["loss_curves.png"] = figures.loss_curves(groups)
    if "mask_quality.png" in promised:
        drawn["mask_quality.png"] = figures.mask_quality_bars(study.mask_quality)
    return drawn


def compose_clips(config: Config, pictures: Pictures) -> dict[str, Figure]:
    """One figure a clip, and one of all masks."""
    drawn = {}
    for dataset, clips in pictures.clips.items():
        for number in range(1, config.report.clips + 1):
            clip = clips[number - 1] if number <= len(clips) else None
            figure = film_strips.compose("", []) if clip is None else film_strips.compose(clip.heading, clip.rows)
            drawn[clip_name(config, dataset, number)] = figure
        blocks = [(clip.heading, clip.rows) for clip in pictures.masks[dataset].clips]
        drawn[masks_name(config, dataset)] = film_strips.compose_all(blocks or [("", [])])
    return drawn


def render(found: Mapping[str, Any]) -> str:
    """The page. Everything in the context is escaped but what is `Markup`."""
    folder = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = to_markup((folder / "style.css").read_text(encoding="utf-8"))
    return environment.get_template("page.html").render(style=style, **found) + "\n"
