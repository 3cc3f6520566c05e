"""Config tables: one row per method and one column per evaluation, alongside the numbers that a paper reports."""

import math
import re
from collections.abc import Sequence

from stm.config import Config, TableRow, TableSpec
from stm.report.results.evaluations import read_measurement
from stm.report.results.records import Measurement, best_mean
from stm.report.tables import Cell, Table, measurement_cell, number, text_cell


def paper_table(config: Config, name: str) -> Table:
    """Build the table `name` of the config.

    Raises:
        ReportError: a required result is missing.
    """
    spec = config.tables[name]
    columns = [""]
    keys = ["row"]
    quoted = [any(row.paper and row.paper[i] is not None for row in spec.rows) for i in range(len(spec.columns))]
    for column, has_paper in zip(spec.columns, quoted, strict=True):
        stem = re.sub(r"\W+", "_", column.title.lower()).strip("_")
        columns += [column.title] + (["paper"] if has_paper else [])
        keys += [f"{stem}_{part}" for part in ("mean", "deviation", "seeds", "low", "high")]
        keys += [f"{stem}_paper"] if has_paper else []
    cells = [[_measure_cell(config, row, spec, i) for i in range(len(spec.columns))] for row in spec.rows]
    best = _best(cells)
    rows = [_table_row(row, line, best, quoted) for row, line in zip(spec.rows, cells, strict=True)]
    return Table(name, columns, keys, rows)


def _measure_cell(config: Config, row: TableRow, spec: TableSpec, column: int) -> Measurement | None:
    run = row.run_of(column)
    task = spec.columns[column].task
    return None if run is None else read_measurement(config, run, task, spec.columns[column].metric)


def _best(cells: Sequence[Sequence[Measurement | None]]) -> list[float]:
    """Return the best mean per column; NaN for columns with fewer than two numbers, so that nothing is bold."""
    best = []
    for column in zip(*cells, strict=True):
        measurements = [cell for cell in column if cell is not None]
        best.append(best_mean(measurements) if len(measurements) > 1 else math.nan)
    return best


def _table_row(
    row: TableRow, cells: Sequence[Measurement | None], best: Sequence[float], quoted: Sequence[bool]
) -> list[Cell]:
    line = [text_cell(row.label)]
    for i, cell in enumerate(cells):
        line.append(measurement_cell(cell, best[i]))
        if quoted[i]:
            line.append(number(row.paper[i] if row.paper else None, 1))
    return line
