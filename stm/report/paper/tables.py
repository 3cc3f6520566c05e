"""Tables as a paper has them: a row a method, a column an evaluation, several seeds in one cell, the paper's number beside it."""

import math
import re
from collections.abc import Sequence
from typing import Any

from stm.config import Config, TableRow, TableSpec
from stm.layout import Layout
from stm.report.results.records import Measured
from stm.report.tables import Cell, Table, measured, number, words
from stm.storage.files import read_json


class ReportError(ValueError):
    """A result that cannot be shown; the message names the file and what to run."""


def measure(config: Config, run: str, task: str, metric: str) -> Measured:
    """A number of an evaluation of all instances of a run.

    Args:
        run, task: names in the config's `pretrain` and `evaluate`.
        metric: where it is in metrics.json, such as `top1` or `text_to_video.r1`.

    Raises:
        ReportError: an evaluation is missing, or has no such number.
    """
    values, found = [], {}
    for instance in config.instances(run):
        path = Layout.of(config, config.dataset_of(instance)).evaluate(instance, task) / "metrics.json"
        if not path.exists():
            raise ReportError(f"{path} is missing; run `stm evaluate --run {instance} --task {task}`, or the workflow")
        found = read_json(path)
        values.append(_look_up(found, metric, str(path)))
    interval = found.get("confidence95") if metric == "top1" and len(values) == 1 else None
    # All else is from 0 to 1, or CIDEr, which may be higher and is told in hundredths as well.
    share = not metric.endswith("_rank")
    return Measured(values, None if interval is None else (float(interval[0]), float(interval[1])), share)


def _look_up(metrics: Any, metric: str, where: str) -> float:
    value = metrics
    for key in metric.split("."):
        if not isinstance(value, dict) or key not in value:
            raise ReportError(f"{where} has no {metric}; it has: {', '.join(sorted(metrics))}")
        value = value[key]
    if not isinstance(value, int | float):
        raise ReportError(f"{where}: {metric} is no number")
    return float(value)


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
    """The best mean of each column: the highest share, or the lowest rank."""
    best = []
    for column in zip(*found, strict=True):
        there = [cell for cell in column if cell is not None]
        means = [cell.mean for cell in there]
        best.append((max if all(cell.share for cell in there) else min)(means) if len(means) > 1 else math.nan)
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
