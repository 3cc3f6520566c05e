"""Tables: built once as rows of cells, then written as CSV and Markdown and shown on the page."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from stm.config import Config
from stm.evaluation.task import Metric
from stm.evaluation.tasks import TASKS
from stm.report.comparison import Entry, clear_best, describe_column
from stm.report.results.records import MaskQualityRow, Measurement, Refusal, RunGroup

MISSING = "\u2013"  # an en dash, as in printed tables
THIN_SPACE = "\u2009"

Value = str | float | int | bool | None


@dataclass(frozen=True)
class Cell:
    """One table cell: human-readable text, and the cell's values in the CSV."""

    text: str
    values: tuple[Value, ...]  # a cell may fill several columns of the CSV: mean, deviation, seeds
    note: str = ""  # shown in small print after the text, such as an interval
    numeric: bool = False
    bold: bool = False  # see `stm.report.comparison.clear_best`


@dataclass(frozen=True)
class Table:
    """A table; `columns` are its human-readable titles, `keys` the header of the CSV."""

    name: str
    columns: list[str]
    keys: list[str]
    rows: list[list[Cell]]
    footer: list[list[Cell]] = field(default_factory=list)  # reference rows, such as the chance level or a total
    outcomes: list[tuple[str, str]] = field(default_factory=list)  # per column: what it shows, and which rows differ

    @property
    def numeric(self) -> list[bool]:
        """Whether each column holds numbers, which are right-aligned."""
        return [any(row[i].numeric for row in self.rows) for i in range(len(self.columns))]

    @property
    def has_notes(self) -> list[bool]:
        """Whether each column has notes; if so, footer cells without a note need an empty one for alignment."""
        return [any(row[i].note for row in self.rows) for i in range(len(self.columns))]

    def to_csv(self) -> str:
        sink = io.StringIO()
        writer = csv.writer(sink, lineterminator="\n")
        writer.writerow(self.keys)
        for row in self.rows + self.footer:
            writer.writerow([_csv_value(value) for cell in row for value in cell.values])
        return sink.getvalue()

    def to_markdown(self) -> str:
        lines = [
            [_escape(name) for name in self.columns],
            ["---:" if numeric else "---" for numeric in self.numeric],
        ]
        for row in self.rows + self.footer:
            texts = [_escape(f"{cell.text} {cell.note}") for cell in row]
            lines.append([f"**{text}**" if cell.bold else text for text, cell in zip(texts, row, strict=True)])
        text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
        outcomes = "".join(f"- {_escape(what)}: {_escape(sentence)}\n" for what, sentence in self.outcomes)
        return f"{text}\n{outcomes}" if outcomes else text


def _csv_value(value: Value) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _escape(text: str) -> str:
    """Escape text for a cell of a Markdown table: it must neither end the cell nor act as markup."""
    for mark in "\\`*_<>|[]":
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.split())


# ------------------------------------------------------------------------------------------------------- cells


def text_cell(text: str) -> Cell:
    """Create a cell of plain text; a dash if the text is empty."""
    return Cell(text or MISSING, (text,))


def count(value: int | None) -> Cell:
    return Cell(MISSING if value is None else f"{value:,}".replace(",", THIN_SPACE), (value,), numeric=True)


def number(value: float | None, digits: int) -> Cell:
    if value is None or math.isnan(value):
        return Cell(MISSING, (None,), numeric=True)
    return Cell(f"{value:.{digits}f}", (value,), numeric=True)


def percent(share: float | None, bold: bool = False) -> Cell:
    """Format a fraction from 0 to 1 as a percentage."""
    if share is None or math.isnan(share):
        return Cell(MISSING, (None,), numeric=True)
    return Cell(f"{100 * share:.1f}", (share,), numeric=True, bold=bold)


def estimate(share: float | None, interval: tuple[float, float] | None, bold: bool = False, *more: Value) -> Cell:
    """Format a fraction (0 to 1) and its interval in per cent; the CSV contains the fraction, low, high and `more`."""
    cell = percent(share, bold)
    low, high = interval or (None, None)
    note = "" if interval is None or share is None else f"[{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"
    return Cell(cell.text, (*cell.values, low, high, *more), note, numeric=True, bold=bold)


def measurement_cell(measurement: Measurement | None, bold: bool = False, seeds: int | None = None) -> Cell:
    """Format a metric over seeds; the CSV contains the mean, deviation, seed count, and interval (see `over_seeds`).

    Args:
        bold: whether the number is the clear best of its column.
        seeds: the number of seeds in the config; the cell notes if fewer have results.
    """
    if measurement is None:
        return Cell(MISSING, (None,) * 5, numeric=True)
    scale, mean, deviation = measurement.scale, measurement.mean, measurement.deviation
    count_of_seeds = len(measurement.values)
    text, note = f"{scale * mean:.1f}", ""
    low, high = measurement.interval or (None, None)
    if deviation is not None:
        text += f" ± {scale * deviation:.1f}"
    if low is not None and high is not None:
        note = f"[{scale * low:.1f}, {scale * high:.1f}]"
    if seeds is not None and count_of_seeds < seeds:
        note = f"{note} {count_of_seeds} of {seeds} seeds".strip()
    return Cell(text, (mean, deviation, count_of_seeds, low, high), note, numeric=True, bold=bold)


# ------------------------------------------------------------------------------------------------------ tables


def results_table(
    config: Config,
    groups: Sequence[RunGroup],
    chances: Mapping[str, float],
    tasks: Sequence[str] | None = None,
) -> Table:
    """Build the results table: one row per pretraining run, averaged over its seeds; chance level in the footer.

    Args:
        groups: the runs, in the order of the rows.
        chances: chance level of each evaluation that has one.
        tasks: the evaluations to show; all evaluations of the config by default.
    """
    tasks = list(config.evaluate) if tasks is None else list(tasks)
    keys = ["run", "dataset"] if config.datasets else ["run"]
    keys += ["mask", "ratio", "epochs", "final_loss", "final_loss_deviation"]
    keys += [
        f"{task}_{part}"
        for task in tasks
        for part in (headline_of(config, task).key, "deviation", "seeds", "low", "high")
    ]
    columns = ["Run", "Dataset"] if config.datasets else ["Run"]
    columns += ["Mask", "Ratio", "Epochs", "Final loss", *(column_title(config, task) for task in tasks)]
    bold = {task: bold_runs(config, groups, task) for task in tasks}
    footer = [
        Cell("Chance", ("chance",)),
        *[Cell("", (None,))] * (len(columns) - len(tasks) - 2),
        Cell("", (None, None)),
    ]
    footer += [_chance(chances.get(task), headline_of(config, task).scale) for task in tasks]
    rows = [_result_row(config, group, tasks, bold) for group in groups]
    outcomes = [line for task in tasks for line in _outcomes(config, groups, task)]
    return Table("results", columns, keys, rows, [footer] if any(task in chances for task in tasks) else [], outcomes)


def _outcomes(config: Config, groups: Sequence[RunGroup], task: str) -> list[tuple[str, str]]:
    """Say which runs differ, once per dataset of an evaluation."""
    by_dataset = compare_runs(config, groups, task)
    return [
        (f"{title(task)} on {dataset}" if len(by_dataset) > 1 else title(task), describe_column(entries))
        for dataset, entries in by_dataset.items()
    ]


def compare_runs(config: Config, groups: Sequence[RunGroup], task: str) -> dict[str, list[Entry]]:
    """Return the measured runs of an evaluation by the dataset that they are evaluated on; only these are comparable."""
    by_dataset: dict[str, list[Entry]] = {}
    for group in groups:
        score = group.score(task)
        if score is not None:
            dataset = config.dataset_of(group.name, task)
            by_dataset.setdefault(dataset, []).append(score.entry(group.name, group.untrained))
    return by_dataset


def bold_runs(config: Config, groups: Sequence[RunGroup], task: str) -> set[str]:
    """Return the names of the runs in bold: at most one per dataset of the evaluation."""
    best = (clear_best(entries) for entries in compare_runs(config, groups, task).values())
    return {entry.name for entry in best if entry is not None}


def _result_row(config: Config, group: RunGroup, tasks: Sequence[str], bold: Mapping[str, set[str]]) -> list[Cell]:
    strategy, ratio = group.mask
    row = [text_cell(group.name), *([text_cell(group.settings.dataset or "")] if config.datasets else [])]
    row += [text_cell(strategy), number(ratio, 2), count(group.settings.optimisation.epochs), _loss(group.final_loss)]
    seeds = len(group.instances)
    return row + [measurement_cell(group.score(task), group.name in bold[task], seeds) for task in tasks]


def _loss(loss: Measurement | None) -> Cell:
    if loss is None:
        return Cell(MISSING, (None, None), numeric=True)
    spread = "" if loss.deviation is None else f" ± {loss.deviation:.4f}"
    return Cell(f"{loss.mean:.4f}{spread}", (loss.mean, loss.deviation), numeric=True)


def _chance(level: float | None, scale: float) -> Cell:
    text = MISSING if level is None else f"{scale * level:.1f}"
    return Cell(text, (level, None, None, None, None), numeric=True)


def title(task: str) -> str:
    """Return a title: `finetune` -> `Fine-tuning`; the name itself if the evaluation is not named after its task."""
    return TASKS[task].title if task in TASKS else task


def headline_of(config: Config, task: str) -> Metric:
    """Return the headline metric of an evaluation's task."""
    return TASKS[config.evaluate[task].task].headline


def metric_of(config: Config, task: str, name: str | None) -> Metric:
    """Return a metric of an evaluation's task by its dotted key in metrics.json; None: the headline."""
    return headline_of(config, task) if name is None else TASKS[config.evaluate[task].task].metric(name)


def column_title(config: Config, task: str, metric: str | None = None) -> str:
    """Return a column title such as `Linear probe, top-1 %`; the metric is the headline, or named as for `metric_of`."""
    shown = metric_of(config, task, metric)
    return f"{title(task)}, {shown.label} {shown.unit}".rstrip()


def per_class_table(config: Config, groups: Sequence[RunGroup]) -> Table:
    """Build the table of accuracy per class, averaged over seeds, with one column per run."""
    rows = []
    for task in config.evaluate:
        accuracies = {group.name: group.class_accuracy(task) for group in groups}
        for label in sorted({label for classes in accuracies.values() for label in classes}):
            cells = [percent(accuracies[group.name].get(label)) for group in groups]
            rows.append([Cell(title(task), (task,)), text_cell(label), *cells])
    names = [group.name for group in groups]
    return Table("per_class", ["Evaluation", "Class", *names], ["evaluation", "class", *names], rows)


def mask_quality_table(rows: Sequence[MaskQualityRow]) -> Table:
    """Build the mask quality table: one row per guide and ratio, one column per camera type, with the interval."""
    cameras = sorted({row.camera for row in rows})
    several_datasets = any(row.dataset for row in rows)
    bold = {id(row) for column in mask_columns(rows) for row in _bold_row(column)}
    keys = [*(["dataset"] if several_datasets else []), "guide", "source", "ratio", "chance"]
    keys += [f"{camera}_{part}" for camera in cameras for part in ("coverage", "low", "high", "clips")]
    columns = [*(["Dataset"] if several_datasets else []), "Mask by", "Captions", "Ratio", "Chance, %"]
    columns += [camera_title(camera) + ", %" for camera in cameras]
    lines = []
    for dataset, guide, source, ratio in dict.fromkeys((row.dataset, row.guide, row.source, row.ratio) for row in rows):
        group = {
            r.camera: r for r in rows if (r.dataset, r.guide, r.source, r.ratio) == (dataset, guide, source, ratio)
        }
        line = [text_cell(dataset)] if several_datasets else []
        line += [text_cell(guide), text_cell(source), number(ratio, 2), percent(next(iter(group.values())).chance)]
        for camera in cameras:
            cell = group.get(camera)
            if cell is None:
                line.append(estimate(None, None, False, None))
            else:
                line.append(estimate(cell.coverage, cell.interval, id(cell) in bold, cell.clips))
        lines.append(line)
    return Table(
        "mask_quality", columns, keys, lines, outcomes=[_describe_masks(column) for column in mask_columns(rows)]
    )


def mask_columns(rows: Sequence[MaskQualityRow]) -> list[list[MaskQualityRow]]:
    """Group the rows that can be compared: coverage grows with the ratio, so only masks of equal ratio are."""
    columns: dict[tuple[str, str, float], list[MaskQualityRow]] = {}
    for row in rows:
        columns.setdefault((row.dataset, row.camera, row.ratio), []).append(row)
    return list(columns.values())


def _bold_row(column: Sequence[MaskQualityRow]) -> list[MaskQualityRow]:
    entries = [row.entry() for row in column]
    best = clear_best(entries)
    return [row for row, entry in zip(column, entries, strict=True) if entry is best]


def _describe_masks(column: Sequence[MaskQualityRow]) -> tuple[str, str]:
    first = column[0]
    what = ", ".join(filter(None, (first.dataset, camera_title(first.camera), f"ratio {first.ratio:g}")))
    return what, describe_column([row.entry() for row in column], "mask", "masks")


def camera_title(camera: str) -> str:
    return {"fixed": "Fixed camera", "moving": "Moving camera", "all": "All clips"}.get(camera, camera)


def quarantine_table(refusals: Sequence[Refusal], datasets: Sequence[str] | None = None) -> Table:
    """Build the quarantine table: one row per clip and stage with a status other than `ok`.

    Args:
        refusals: the refused clips, one per row.
        datasets: the dataset of each row, if there are several.
    """
    columns = ["Stage", "Clip", "File", "Status", "Policy", "Kept", "Detail"]
    keys = ["stage", "video_id", "path", "status", "policy", "kept", "detail"]
    rows = [
        [
            *(text_cell(text) for text in (r.stage, r.video_id, r.path, r.status, r.policy)),
            Cell("yes" if r.kept else "no", (r.kept,)),
            text_cell(r.detail),
        ]
        for r in refusals
    ]
    if datasets is not None:
        columns, keys = ["Dataset", *columns], ["dataset", *keys]
        rows = [[text_cell(name), *row] for name, row in zip(datasets, rows, strict=True)]
    return Table("quarantine", columns, keys, rows)
