"""Tables as a paper has them: a row a method, a column an evaluation, several seeds in one cell, the paper's number beside it."""

import math
import re
from collections.abc import Sequence

from stm.config import Config, TableRow, TableSpec
from stm.report.results.evaluations import measure
from stm.report.results.records import Measured, best_mean
from stm.report.tables import Cell, Table, measured, number, words


def paper_table(config: Config, name: str) -> Table:
    """The table `name` of the config, from the evaluations' files.

    Raises:
        ReportError: a number that it needs is missing.
    """
    spec = config.tables[name]
    columns, keys = [""], ["row"]
    quoted = [any(row.paper and row.paper[i] is not None for row in spec.rows) for i in range(len(spec.columns))]
    for column, has_paper in zip(spec.columns, quoted, strict=True):
        stem = re.sub(r"\W+", "_", column.title.lower()).strip("_")
        columns += [column.title] + (["paper"] if has_paper else [])
        keys += [f"{stem}_{part}" for part in ("mean", "deviation", "seeds", "low", "high")]
        keys += [f"{stem}_paper"] if has_paper else []
    found = [[_measure_cell(config, row, spec, i) for i in range(len(spec.columns))] for row in spec.rows]
    rows = [_table_row(row, cells, _best(found), quoted) for row, cells in zip(spec.rows, found, strict=True)]
    return Table(name, columns, keys, rows)


def _measure_cell(config: Config, row: TableRow, spec: TableSpec, column: int) -> Measured | None:
    run, wanted = row.run_of(column), spec.columns[column]
    return None if run is None else measure(config, run, wanted.task, wanted.metric)


def _best(found: Sequence[Sequence[Measured | None]]) -> list[float]:
    """The best mean of each column; NaN where there is nothing to compare it with."""
    best = []
    for column in zip(*found, strict=True):
        there = [cell for cell in column if cell is not None]
        best.append(best_mean(there) if len(there) > 1 else math.nan)
    return best


def _table_row(
    row: TableRow, cells: Sequence[Measured | None], best: Sequence[float], quoted: Sequence[bool]
) -> list[Cell]:
    line = [words(row.label)]
    for i, cell in enumerate(cells):
        line.append(measured(cell, best[i]))
        if quoted[i]:
            line.append(number(row.paper[i] if row.paper else None, 1))
    return line
