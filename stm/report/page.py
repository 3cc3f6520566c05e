"""The report as a whole: writes the tables, the figures and one self-contained HTML page."""

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup
from matplotlib.figure import Figure

from stm.config import Config
from stm.files import write_bytes
from stm.layout import Layout
from stm.progress import Progress
from stm.report import figure_names, figures, story, strips, table_names, tables
from stm.report.clips import ClipPicture, picture_clips
from stm.report.collect import collect
from stm.report.records import Results
from stm.report.stages import Provenance, collect_provenance
from stm.report.strips import Row
from stm.report.tables import Table

MOST_REFUSALS = 300  # rows on the page; the CSV has them all

COMMANDS = """\
snakemake --cores all --configfile config.yaml plan   # what it will cost
snakemake --cores all --configfile config.yaml        # everything, up to this page
stm report --config config.yaml                       # this page again, from the results that there are"""


def write_report(config: Config, layout: Layout) -> None:
    """Writes everything that `table_names` and `figure_names` promise, and the page."""
    with Progress("report", total=4, unit="parts") as progress:
        results = collect(config, layout)
        provenance = collect_provenance(config, layout, results)
        progress.advance(note="results read")
        made_tables = _write_tables(config, layout, results)
        progress.advance(note="tables")
        clips = picture_clips(config, layout, results)
        progress.advance(note="clips")
        charts = _write_figures(config, layout, results, clips)
        context = _context(config, results, provenance, made_tables, clips, charts)
        write_bytes(layout.report, render(context).encode())
        progress.advance(note=str(layout.report))


def _write_tables(config: Config, layout: Layout, results: Results) -> dict[str, Table]:
    made = {
        "results": tables.results_table(config, results.runs),
        "per_class": tables.per_class_table(config, results.runs),
        "mask_quality": tables.mask_quality_table(results.mask_quality),
        "quarantine": tables.quarantine_table(results.refusals),
    }
    for name in table_names(config):
        stem, ending = name.rsplit(".", 1)
        text = made[stem].to_csv() if ending == "csv" else made[stem].to_markdown()
        write_bytes(layout.tables / name, text.encode())
    return made


def _write_figures(config: Config, layout: Layout, results: Results, clips: Sequence[ClipPicture]) -> dict[str, Markup]:
    """PNG files for all names, pictures that say so where there is nothing to show; the charts as SVG for the page."""
    drawn: dict[str, Figure] = {}
    if config.pretrain:
        drawn["loss_curves.png"] = figures.loss_curves(results.runs)
    if config.mask_quality is not None:
        drawn["mask_quality.png"] = figures.mask_quality_bars(results.mask_quality)
    for number in range(1, config.report.clips + 1):
        clip = clips[number - 1] if number <= len(clips) else None
        heading = "" if clip is None else f"{clip.clip.video_id}   {clip.clip.label}   “{clip.caption}”"
        drawn[f"clip_{number}.png"] = strips.compose(heading, [] if clip is None else clip.rows)
    for name in figure_names(config):
        write_bytes(layout.figures / name, figures.to_png(drawn[name]))
    charts = {}
    if any(run.losses for run in results.runs):
        runs = ", ".join(run.name for run in results.runs)
        charts["loss"] = _trusted(figures.to_svg(drawn["loss_curves.png"], "loss", f"Loss curves of the runs {runs}"))
    if results.mask_quality and "mask_quality.png" in drawn:
        svg = figures.to_svg(drawn["mask_quality.png"], "quality", "Mask quality by guide and camera")
        charts["quality"] = _trusted(svg)
    return charts


def _trusted(text: str) -> Markup:
    """Markup that this package made itself; no text from data gets here unescaped."""
    return Markup(text)  # noqa: S704  the style sheet, our own SVG and hexadecimal colours


def render(context: dict[str, Any]) -> str:
    """The page. Everything in the context is escaped but what is `Markup`."""
    folder = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = _trusted((folder / "style.css").read_text(encoding="utf-8"))
    return environment.get_template("page.html").render(style=style, **context) + "\n"


def _context(
    config: Config,
    results: Results,
    provenance: Provenance,
    made: dict[str, Table],
    clips: Sequence[ClipPicture],
    charts: dict[str, Markup],
) -> dict[str, Any]:
    """All that the template speaks of."""
    refusals = results.refusals
    return {
        "title": config.report.title,
        "findings": story.findings(config, results),
        "problems": results.problems,
        "facts": story.facts(config, provenance),
        "splits": story.splits_table(results),
        "models": story.models_table(provenance),
        "stages": story.stages_table(provenance.stages),
        "planned": any(s.planned_jobs is not None for s in provenance.stages),
        "timed": any(s.seconds is not None for s in provenance.stages),
        "results": made["results"],
        "swatches": [figures.run_color(number) for number in range(len(results.runs))],
        "evaluated": any(run.evaluations for run in results.runs),
        "per_class": made["per_class"],
        "loss_chart": charts.get("loss"),
        "silent": [run.name for run in results.runs if not run.losses],
        **_clip_context(config, results, clips),
        "quality": made["mask_quality"],
        "faithfulness": story.faithfulness(results),
        "quality_chart": charts.get("quality"),
        "captions": list(story.caption_sections(config, results)),
        "quarantine": tables.quarantine_table(refusals[:MOST_REFUSALS]),
        "hidden_refusals": max(0, len(refusals) - MOST_REFUSALS),
        "statuses": story.count_statuses(results),
        "commands": COMMANDS,
        "config_yaml": yaml.safe_dump(
            config.model_dump(mode="json", exclude_defaults=True), sort_keys=False, allow_unicode=True, width=100
        ),
        "receipts": story.show_receipts(provenance),
    }


def _clip_context(config: Config, results: Results, clips: Sequence[ClipPicture]) -> dict[str, Any]:
    rows = [row for clip in clips for row in clip.rows]
    shown = {row.label for row in rows if row.kind == "map"}
    slots = max((len(row.tiles) for row in rows), default=1)
    return {
        "clips": [_show(clip) for clip in clips],
        "wanted_clips": config.report.clips > 0,
        "slots": slots,
        "subsampled": any(run.settings.frames // run.settings.tubelet > slots for run in results.runs),
        "boxed": any(clip.clip.boxes is not None for clip in clips),
        "painted": any(row.kind == "reconstruction" for row in rows),
        "missing_guides": [name for name in ("Text similarity", "Motion") if name not in shown],
        "stops": _trusted(", ".join(strips.colormap_stops())),
    }


def _show(picture: ClipPicture) -> dict[str, Any]:
    clip = picture.clip
    camera = f"{clip.camera} camera" if clip.camera else ""
    return {
        "name": clip.video_id,
        "split": clip.split,
        "about": ", ".join(filter(None, (clip.label, camera))),
        "caption": picture.caption,
        "others": [caption for caption in dict.fromkeys(clip.captions) if caption != picture.caption],
        "rows": [_show_row(row) for row in picture.rows],
    }


def _show_row(row: Row) -> dict[str, Any]:
    media, data = strips.encode(row.tiles)
    scale = row.scale and {"low": f"{row.scale.low:.2f}", "high": f"{row.scale.high:.2f}", "unit": row.scale.unit}
    return {
        "kind": row.kind,
        "label": row.label,
        "note": row.note,
        "color": "" if row.run is None else figures.run_color(row.run),
        "scale": scale,
        "image": f"data:{media};base64,{base64.b64encode(data).decode()}",
    }
