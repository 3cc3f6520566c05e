"""Config tables: one row per method and one column per evaluation, alongside the numbers that a paper reports."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from stm.config import Certainty, Config, TableRow, TableSpec
from stm.report.comparison import Entry, clear_best, describe_column
from stm.report.names import untrained_runs
from stm.report.results.evaluations import read_measurement
from stm.report.results.records import Measurement
from stm.report.tables import Cell, Table, measurement_cell, number, text_cell

# The mark beside a published number, and what it means: the fuller the circle, the closer to the source.
MARKS: Mapping[Certainty | None, tuple[str, str]] = {
    "source": ("\u25cf", "read in the source"),
    "second_hand": ("\u25d0", "at second hand"),
    "aggregator": ("\u25cb", "from a site that collects results"),
    None: ("?", "where it was read is not stated"),
}


def paper_table(config: Config, name: str) -> Table:
    """Build the table `name` of the config.

    Raises:
        ReportError: a required result is missing.
    """
    spec = config.tables[name]
    columns = [""]
    quoted = _quoted_columns(spec)
    for column, has_paper in zip(spec.columns, quoted, strict=True):
        columns += [column.title] + (["paper"] if has_paper else [])
    cells = [[_measure_cell(config, row, spec, i) for i in range(len(spec.columns))] for row in spec.rows]
    compared = [_entries(config, spec, [line[i] for line in cells], i) for i in range(len(spec.columns))]
    bold = [clear_best(entries, references) for entries, references in compared]
    rows = [
        _table_row(
            spec,
            row,
            line,
            [bold[i] is not None and bold[i] is compared[i][0][place] for i in range(len(line))],
            quoted,
        )
        for place, (row, line) in enumerate(zip(spec.rows, cells, strict=True))
    ]
    outcomes = [
        (column.title, describe_column([entry for entry in entries if entry is not None] + references, "row", "rows"))
        for column, (entries, references) in zip(spec.columns, compared, strict=True)
    ]
    return Table(name, columns, csv_header(spec), rows, outcomes=outcomes)


def csv_header(spec: TableSpec) -> list[str]:
    """Return the columns of a table's CSV, which only depend on the config."""
    keys = ["row"]
    for column, has_paper in zip(spec.columns, _quoted_columns(spec), strict=True):
        stem = re.sub(r"\W+", "_", column.title.lower()).strip("_")
        keys += [f"{stem}_{part}" for part in ("mean", "deviation", "seeds", "low", "high")]
        keys += [f"{stem}_paper", f"{stem}_paper_certainty"] if has_paper else []
    return keys


def _quoted_columns(spec: TableSpec) -> list[bool]:
    """Whether each column has a published number."""
    return [any(spec.published(row, i)[0] is not None for row in spec.rows) for i in range(len(spec.columns))]


def table_note(spec: TableSpec) -> str:
    """The note below a table: the config's own, and what the marks of its published numbers mean; empty without both."""
    cells = [spec.published(row, i) for row in spec.rows for i in range(len(spec.columns))]
    used = {certainty for value, certainty in cells if value is not None}
    legend = "; ".join(f"{mark} {meaning}" for certainty, (mark, meaning) in MARKS.items() if certainty in used)
    return " ".join(filter(None, (spec.note, f"Published numbers: {legend}." if legend else "")))


def _measure_cell(config: Config, row: TableRow, spec: TableSpec, column: int) -> Measurement | None:
    run = row.run_of(column)
    task = spec.columns[column].task
    return None if run is None else read_measurement(config, run, task, spec.columns[column].metric)


def _entries(
    config: Config, spec: TableSpec, measured: Sequence[Measurement | None], column: int
) -> tuple[list[Entry | None], list[Entry]]:
    """Return a column's entries, one per row, and the untrained runs that are not among them."""
    task, metric = spec.columns[column].task, spec.columns[column].metric
    untrained = untrained_runs(config, spec, column)
    runs = [row.run_of(column) for row in spec.rows]
    entries = [
        None if cell is None else cell.entry(row.label, run in untrained)
        for row, run, cell in zip(spec.rows, runs, measured, strict=True)
    ]
    others = [run for run in untrained if run not in runs]
    references = [read_measurement(config, run, task, metric).entry(run, untrained=True) for run in others]
    return entries, references


def _table_row(
    spec: TableSpec, row: TableRow, cells: Sequence[Measurement | None], bold: Sequence[bool], quoted: Sequence[bool]
) -> list[Cell]:
    line = [text_cell(row.label)]
    for i, cell in enumerate(cells):
        line.append(measurement_cell(cell, bold[i]))
        if quoted[i]:
            line.append(_published_cell(*spec.published(row, i)))
    return line


def _published_cell(value: float | None, certainty: Certainty | None) -> Cell:
    """A published number with its mark; the CSV contains the number and its certainty."""
    cell = number(value, 1)
    return replace(cell, values=(*cell.values, certainty), note="" if value is None else MARKS[certainty][0])
