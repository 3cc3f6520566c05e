"""Write the report: tables, figures and one self-contained HTML page."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from markupsafe import Markup
from matplotlib.figure import Figure

from stm.config import Config
from stm.jobs.progress import Progress
from stm.layout import Layout
from stm.report import figures, tables
from stm.report.clips import film_strips
from stm.report.clips.draw import ClipStrips, draw_clip_strips
from stm.report.clips.gallery import MaskGallery, draw_mask_gallery
from stm.report.expectations import expectations_table
from stm.report.html import make_environment, to_markup
from stm.report.names import clip_name, figure_names, masks_name, table_names
from stm.report.page import context, sentences
from stm.report.page.own_tables import show_figures, show_tables
from stm.report.results.collect import collect_study
from stm.report.results.provenance import collect_provenance, describe_results, write_provenance
from stm.report.results.records import RunGroup, Study
from stm.report.tables import Table
from stm.report.viewer.fragment import make_parts
from stm.report.viewer.masks import MaskViewer, draw_study_masks
from stm.storage.files import write_bytes


@dataclass
class Strips:
    """Film strips of clips and of masks, and mask viewers, by dataset."""

    clips: dict[str, list[ClipStrips]] = field(default_factory=dict)
    masks: dict[str, MaskGallery] = field(default_factory=dict)
    viewers: dict[str, MaskViewer] = field(default_factory=dict)


def write_report(config: Config, layout: Layout) -> None:
    """Write all files listed by `table_names` and `figure_names`, the page, and where the results come from."""
    with Progress("report", total=5, unit="parts") as progress:
        study = collect_study(config, layout)
        groups = study.groups
        provenance = collect_provenance(study, layout)
        progress.advance(note="results read")
        built = write_tables(study, groups, layout)
        progress.advance(note="tables")
        strips = draw_strips(study, groups)
        progress.advance(note="clips")
        charts = write_figures(study, groups, strips, layout)
        progress.advance(note="figures")
        own: dict[str, Any] = {"config_tables": show_tables(study), "config_figures": show_figures(study, layout)}
        own["viewer"] = make_parts(strips.viewers)
        values = context.make_context(study, groups, provenance, built, charts, strips.clips, strips.masks)
        # The problems are read last, because all of the steps above may add to them.
        write_provenance(layout.provenance, describe_results(config, provenance))
        write_bytes(layout.report, render(values | own | {"problems": study.problems}).encode())
        progress.advance(note=str(layout.report))


def write_tables(study: Study, groups: list[RunGroup], layout: Layout) -> dict[str, Table]:
    """Write the report's tables; return them by name, including tables without a file for this config."""
    refusals = [(dataset.name, refusal) for dataset in study.datasets for refusal in dataset.results.refusals]
    names = [name for name, _ in refusals] if study.several else None
    built = {
        "expectations": expectations_table(study, groups),
        "results": tables.results_table(study.config, groups, sentences.chances(groups)),
        "per_class": tables.per_class_table(study.config, groups),
        "mask_quality": tables.mask_quality_table(study.mask_quality),
        "quarantine": tables.quarantine_table([refusal for _, refusal in refusals], names),
    }
    for name in table_names(study.config):
        stem, ending = name.rsplit(".", 1)
        text = built[stem].to_csv() if ending == "csv" else built[stem].to_markdown()
        write_bytes(layout.tables / name, text.encode())
    return built


def draw_strips(study: Study, groups: list[RunGroup]) -> Strips:
    """Draw the clips and masks of each shown dataset."""
    strips = Strips()
    for dataset in study.shown:
        runs = dataset.own_groups(groups)
        strips.clips[dataset.name] = draw_clip_strips(dataset.config, dataset.layout, dataset.results, runs)
        draw = partial(draw_mask_gallery, dataset.config, dataset.layout, dataset.results)
        strips.masks[dataset.name] = dataset.results.attempt("masks", draw, MaskGallery())
        view = partial(draw_study_masks, dataset.config, dataset.layout, dataset.results)
        strips.viewers[dataset.name] = dataset.results.attempt("mask viewer", view, MaskViewer([]))
    return strips


def write_figures(study: Study, groups: list[RunGroup], strips: Strips, layout: Layout) -> dict[str, Markup]:
    """Write all figures as PNG, with a message in place of missing results; return the charts as SVG for the page."""
    drawn = {**draw_charts(study, groups), **compose_clips(study.config, strips)}
    for name in figure_names(study.config):
        write_bytes(layout.figures / name, figures.to_png(drawn[name]))
    charts = {}
    for objective in figures.find_objectives(groups):
        panel = figures.loss_panel(groups, objective)
        label = f"{figures.title_objective(objective)} of each run by step"
        charts[f"loss-{objective}"] = to_markup(figures.to_svg(panel, f"loss-{objective}", label))
    if study.mask_quality and "mask_quality.png" in drawn:
        chart = figures.mask_quality_bars(study.mask_quality, width=5.0)  # legible on a phone, which scales it down
        svg = figures.to_svg(chart, "quality", "Mask quality by guide and camera")
        charts["quality"] = to_markup(svg)
    return charts


def draw_charts(study: Study, groups: list[RunGroup]) -> dict[str, Figure]:
    """Draw whichever of the two charts this config includes."""
    names = figure_names(study.config)
    drawn = {}
    if "loss_curves.png" in names:
        drawn["loss_curves.png"] = figures.loss_curves(groups)
    if "mask_quality.png" in names:
        drawn["mask_quality.png"] = figures.mask_quality_bars(study.mask_quality)
    return drawn


def compose_clips(config: Config, strips: Strips) -> dict[str, Figure]:
    """Compose, per dataset, one figure per clip and one of all masks, with a message in place of missing clips."""
    drawn = {}
    for dataset, clips in strips.clips.items():
        blocks = [(clip.heading, clip.rows) for clip in clips]
        for number in range(1, config.report.clips + 1):
            drawn[clip_name(config, dataset, number)] = film_strips.compose(blocks[number - 1 : number] or [("", [])])
        masks = [(clip.heading, clip.rows) for clip in strips.masks[dataset].clips]
        drawn[masks_name(config, dataset)] = film_strips.compose(masks or [("", [])])
    return drawn


def render(values: Mapping[str, Any]) -> str:
    """Render the page. Everything in its context is escaped except `Markup`."""
    folder = Path(__file__).parent
    style = to_markup((folder / "style.css").read_text(encoding="utf-8"))
    return make_environment(folder).get_template("page.html").render(style=style, **values) + "\n"
