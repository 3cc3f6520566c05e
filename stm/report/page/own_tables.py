"""The tables and figures defined in the config, as shown on the page."""

import io
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from markupsafe import Markup
from PIL import Image

from stm.config import Config
from stm.layout import Layout
from stm.report import figures
from stm.report.clips import film_strips
from stm.report.html import data_url, to_markup
from stm.report.paper.tables import paper_table, table_note
from stm.report.paper.write import draw_figure
from stm.report.results.evaluations import ReportError
from stm.report.results.records import Study
from stm.report.tables import Table


@dataclass(frozen=True)
class ConfigTable:
    """A table defined in the config, or the reason it is missing."""

    name: str
    title: str
    table: Table | None
    note: str = ""
    missing_reason: str = ""


@dataclass(frozen=True)
class ConfigFigure:
    """A figure defined in the config, as `<svg>` or as an image's data URL, or the reason it is missing."""

    name: str
    title: str
    svg: Markup | None = None
    image: str = ""
    missing_reason: str = ""


def show_tables(study: Study) -> list[ConfigTable]:
    """Build every table defined in the config."""
    shown = []
    for name, spec in study.config.tables.items():
        failed: Table | str = "see the problems above"
        table = study.own.attempt(f"table {name}", partial(_table_or_reason, study.config, name), failed)
        note = table_note(spec)
        if isinstance(table, Table):
            shown.append(ConfigTable(name, spec.title, table, note))
        else:
            shown.append(ConfigTable(name, spec.title, None, note, table))
    return shown


def _table_or_reason(config: Config, name: str) -> Table | str:
    try:
        return paper_table(config, name)
    except ReportError as error:  # results may not exist yet: not reported as a problem
        return str(error)


def show_figures(study: Study, layout: Layout) -> list[ConfigFigure]:
    """Prepare every figure defined in the config for the page.

    Charts are redrawn as SVG, which follows the page's colours; clips are read from their PNG file if it exists.
    """
    shown = []
    for name, spec in study.config.figures.items():
        draw = partial(_figure_or_reason, study.config, name, layout.figures / f"{name}.png")
        failed = ConfigFigure(name, spec.title, missing_reason="see the problems above")
        try:
            shown.append(study.own.attempt(f"figure {name}", draw, failed))
        except RuntimeError as error:  # raised by torch for weights that do not fit the config
            study.own.problems.append(f"figure {name}: {error}")
            shown.append(failed)
    return shown


def _figure_or_reason(config: Config, name: str, file: Path) -> ConfigFigure:
    spec = config.figures[name]
    try:
        if spec.kind != "clips":
            chart = draw_figure(config, name)
            for axes in chart.axes:
                axes.set_title("", loc="left")  # the page's caption shows the title
            return ConfigFigure(name, spec.title, svg=to_markup(figures.to_svg(chart, f"figure-{name}", spec.title)))
        png = file.read_bytes() if file.exists() else figures.to_png(draw_figure(config, name))
    except ReportError as error:  # results may not exist yet: not reported as a problem
        return ConfigFigure(name, spec.title, missing_reason=str(error))
    with Image.open(io.BytesIO(png)) as image:
        return ConfigFigure(name, spec.title, image=data_url(*film_strips.encode_image(image.convert("RGB"))))
