"""The config's own tables and figures, as the page shows them."""

import base64
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
from stm.report.paper.tables import paper_table
from stm.report.paper.write import draw_figure
from stm.report.results.evaluations import ReportError
from stm.report.results.records import Study
from stm.report.tables import Table


@dataclass(frozen=True)
class ConfigTable:
    """A table of the config, or the reason why it is missing."""

    name: str
    title: str
    table: Table | None
    note: str = ""
    missing_reason: str = ""


@dataclass(frozen=True)
class ConfigFigure:
    """A figure of the config as an `<svg>` or as an image's data URL, or the reason why it is missing."""

    name: str
    title: str
    svg: Markup | None = None
    image: str = ""
    missing_reason: str = ""


def show_tables(study: Study) -> list[ConfigTable]:
    """Build every table of the config."""
    shown = []
    for name, spec in study.config.tables.items():
        failed: Table | str = "see the problems above"
        table = study.own.attempt(f"table {name}", partial(_table_or_reason, study.config, name), failed)
        note = spec.note or ""
        if isinstance(table, Table):
            shown.append(ConfigTable(name, spec.title, table, note))
        else:
            shown.append(ConfigTable(name, spec.title, None, note, table))
    return shown


def _table_or_reason(config: Config, name: str) -> Table | str:
    try:
        return paper_table(config, name)
    except ReportError as error:  # results that do not exist yet are not a problem
        return str(error)


def show_figures(study: Study, layout: Layout) -> list[ConfigFigure]:
    """Show every figure of the config.

    Charts are drawn again as SVG, which follows the page's colours; clips come from their PNG file if it exists.
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
                axes.set_title("", loc="left")  # the page's caption has the title
            return ConfigFigure(name, spec.title, svg=to_markup(figures.to_svg(chart, f"figure-{name}", spec.title)))
        png = file.read_bytes() if file.exists() else figures.to_png(draw_figure(config, name))
    except ReportError as error:  # results that do not exist yet are not a problem
        return ConfigFigure(name, spec.title, missing_reason=str(error))
    with Image.open(io.BytesIO(png)) as image:
        return ConfigFigure(name, spec.title, image=data_url(*film_strips.encode_image(image.convert("RGB"))))


def to_markup(text: str) -> Markup:
    """Mark text as safe HTML; only for markup made by this package, never for text from data."""
    return Markup(text)  # noqa: S704  the style sheet, our own SVG and hexadecimal colours


def data_url(media: str, data: bytes) -> str:
    return f"data:{media};base64,{base64.b64encode(data).decode()}"
