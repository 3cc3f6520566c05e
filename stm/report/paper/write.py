"""Write one of a config's tables or figures: the last step of, for example, `snakemake tgm_table1`."""

from pathlib import Path

from matplotlib.figure import Figure

from stm.config import Config
from stm.layout import Layout
from stm.report.figures import to_png
from stm.report.paper.figures import draw_bars, draw_losses, draw_persistence
from stm.report.paper.tables import paper_table, table_note
from stm.storage.files import write_bytes


def write_table(config: Config, name: str) -> Path:
    """Write `tables/{name}.csv` and `.md`; return the path of the Markdown file.

    Raises:
        ReportError: a required result is missing.
    """
    table = paper_table(config, name)
    folder = Layout.of(config).tables
    spec = config.tables[name]
    write_bytes(folder / f"{name}.csv", table.to_csv().encode())
    note = table_note(spec)
    text = f"**{spec.title}**\n\n{table.to_markdown()}" + (f"\n{note}\n" if note else "")
    write_bytes(folder / f"{name}.md", text.encode())
    return folder / f"{name}.md"


def write_figure(config: Config, name: str) -> Path:
    """Write `figures/{name}.png`; return its path.

    Raises:
        ReportError: a required run or evaluation is missing.
    """
    path = Layout.of(config).figures / f"{name}.png"
    write_bytes(path, to_png(draw_figure(config, name)))
    return path


def draw_figure(config: Config, name: str) -> Figure:
    """Draw the figure `name`; raises the same errors as `write_figure`."""
    kind = config.figures[name].kind
    if kind == "clips":
        from stm.report.paper.clips import draw_clips  # needs torch, which takes seconds to import

        return draw_clips(config, name)
    return {"losses": draw_losses, "bars": draw_bars, "persistence": draw_persistence}[kind](config, name)
