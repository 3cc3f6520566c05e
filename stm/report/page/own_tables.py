"""The tables and figures that a config names, as they stand on the page."""

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
class ShownTable:
    """A table of the config, or why it is not there."""

    name: str
    title: str
    table: Table | None
    note: str = ""
    absent: str = ""


@dataclass(frozen=True)
class ShownFigure:
    """A figure of the config as an `<svg>` or as a picture's data address, or why it is not there."""

    name: str
    title: str
    svg: Markup | None = None
    image: str = ""
    absent: str = ""


def show_tables(study: Study) -> list[ShownTable]:
    """Every table, from the evaluations' files."""
    found = []
    for name, spec in study.config.tables.items():
        failed: Table | str = "see the problems above"
        table = study.own.attempt(f"table {name}", partial(_table_or_reason, study.config, name), failed)
        note = spec.note or ""
        if isinstance(table, Table):
            found.append(ShownTable(name, spec.title, table, note))
        else:
            found.append(ShownTable(name, spec.title, None, note, table))
    return found


def _table_or_reason(config: Config, name: str) -> Table | str:
    try:
        return paper_table(config, name)
    except ReportError as error:  # results that are not there yet are no problem
        return str(error)


def show_figures(study: Study, layout: Layout) -> list[ShownFigure]:
    """Every figure: charts drawn again, so that they follow the page's ink; clips from their file, if it is there."""
    found = []
    for name, spec in study.config.figures.items():
        draw = partial(_figure_or_reason, study.config, name, layout.figures / f"{name}.png")
        failed = ShownFigure(name, spec.title, absent="see the problems above")
        try:
            found.append(study.own.attempt(f"figure {name}", draw, failed))
        except RuntimeError as error:  # torch: weights that do not fit the config
            study.own.problems.append(f"figure {name}: {error}")
            found.append(failed)
    return found


def _figure_or_reason(config: Config, name: str, file: Path) -> ShownFigure:
    spec = config.figures[name]
    try:
        if spec.kind != "clips":
            chart = draw_figure(config, name)
            for axes in chart.axes:
                axes.set_title("", loc="left")  # the caption says it
            return ShownFigure(name, spec.title, svg=to_markup(figures.to_svg(chart, f"figure-{name}", spec.title)))
        png = file.read_bytes() if file.exists() else figures.to_png(draw_figure(config, name))
    except ReportError as error:  # results that are not there yet are no problem
        return ShownFigure(name, spec.title, absent=str(error))
    with Image.open(io.BytesIO(png)) as image:
        return ShownFigure(name, spec.title, image=data_address(*film_strips.encode_image(image.convert("RGB"))))


def to_markup(text: str) -> Markup:
    """Markup that this package made itself; no text from data gets here unescaped."""
    return Markup(text)  # noqa: S704  the style sheet, our own SVG and hexadecimal colours


def data_address(media: str, data: bytes) -> str:
    return f"data:{media};base64,{base64.b64encode(data).decode()}"
