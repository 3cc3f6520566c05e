"""Tables, figures and the page.

The names of what a report writes follow from the config alone, so that the workflow can declare them. This
module stays light: the workflow imports it to read the names.
"""

from pathlib import Path

from stm.config import Config
from stm.layout import Layout


def build_report(config: Config, layout: Layout) -> None:
    """Reads all results and writes `tables/*`, `figures/*` and the page `report.html` into `layout`, the config's folder.

    Parts without results are named on the page; they never stop it.
    """
    from stm.report.page.write import write_report

    write_report(config, layout)


def write_table(config: Config, name: str) -> Path:
    """Writes one of `config.tables`: `tables/{name}.csv` and `.md`; returns the latter."""
    from stm.report.paper.write import write_table

    return write_table(config, name)


def write_figure(config: Config, name: str) -> Path:
    """Writes one of `config.figures`: `figures/{name}.png`; returns its path."""
    from stm.report.paper.write import write_figure

    return write_figure(config, name)
