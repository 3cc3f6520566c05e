"""Tables, figures and the HTML page.

The file names of a report depend only on the config, so that the workflow can declare them. This module avoids
heavy imports, because the workflow and `stm --help` import it.
"""

from pathlib import Path

from stm.config import Config
from stm.layout import Layout


def build_report(config: Config, layout: Layout) -> None:
    """Read all results and write `tables/*`, `figures/*`, `provenance.json` and the page `report.html` into `layout`.

    Missing or damaged results are listed on the page and never abort the report.
    """
    from stm.report.page.write import write_report

    write_report(config, layout)


def write_table(config: Config, name: str) -> Path:
    """Write one of `config.tables` to `tables/{name}.csv` and `.md`; return the path of the Markdown file."""
    from stm.report.paper.write import write_table

    return write_table(config, name)


def write_figure(config: Config, name: str) -> Path:
    """Write one of `config.figures` to `figures/{name}.png`; return its path."""
    from stm.report.paper.write import write_figure

    return write_figure(config, name)
