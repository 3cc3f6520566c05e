"""The tables: built once as rows of cells, written as CSV and Markdown, and shown on the page."""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from stm.config import Config
from stm.report.records import MaskQualityRow, Refusal, Run

MISSING = "\u2013"  # an en dash, as in printed tables
THIN_SPACE = "\u2009"

Value = str | float | int | bool | None


@dataclass(frozen=True)
class Cell:
    """One entry: the text for people, the value or values for machines, and how it is set."""

    text: str
    values: tuple[Value, ...]  # one for each of the CSV's columns that this cell stands for
    note: str = ""  # smaller, behind the text: an interval
    numeric: bool = False
    best: bool = False  # of its column


@dataclass(frozen=True)
class Table:
    """A table; `columns` are the names for people, `keys` those of the CSV."""

    name: str
    columns: list[str]
    keys: list[str]
    rows: list[list[Cell]]
    footer: list[list[Cell]] = field(default_factory=list)  # rows set apart: levels to compare with

    @property
    def numeric(self) -> list[bool]:
        """Which columns hold numbers and are set flush right."""
        return [any(row[i].numeric for row in self.rows) for i in range(len(self.columns))]

    @property
    def noted(self) -> list[bool]:
        """Which columns carry notes, so that a footer without one still lines up."""
        return [any(row[i].note for row in self.rows) for i in range(len(self.columns))]

    def to_csv(self) -> str:
        sink = io.StringIO()
        writer = csv.writer(sink, lineterminator="\n")
        writer.writerow(self.keys)
        for row in self.rows + self.footer:
            writer.writerow([_machine(value) for cell in row for value in cell.values])
        return sink.getvalue()

    def to_markdown(self) -> str:
        lines = [
            [_escape(name) for name in self.columns],
            ["---:" if right else "---" for right in self.numeric],
        ]
        for row in self.rows + self.footer:
            texts = [_escape(f"{cell.text} {cell.note}") for cell in row]
            lines.append([f"**{t}**" if cell.best else t for t, cell in zip(texts, row, strict=True)])
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _machine(value: Value) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _escape(text: str) -> str:
    """Text that stays inside its cell of a Markdown table and is no markup."""
    for mark in "\\`*_<>|[]":
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.split())


# ------------------------------------------------------------------------------------------------------- cells


def words(text: str) -> Cell:
    return Cell(text or MISSING, (text,))


def count(value: int | None) -> Cell:
    return Cell(MISSING if value is None else f"{value:,}".replace(",", THIN_SPACE), (value,), numeric=True)


def number(value: float | None, digits: int) -> Cell:
    if value is None or math.isnan(value):
        return Cell(MISSING, (None,), numeric=True)
    return Cell(f"{value:.{digits}f}", (value,), numeric=True)


def percent(share: float | None, best: bool = False) -> Cell:
    """A share from 0 to 1 as per cent."""
    if share is None or math.isnan(share):
        return Cell(MISSING, (None,), numeric=True)
    return Cell(f"{100 * share:.1f}", (share,), numeric=True, best=best)


def estimate(share: float | None, interval: tuple[float, float] | None, best: bool = False, *more: Value) -> Cell:
    """A measured share with its interval; the CSV gets share, low, high and `more`."""
    cell = percent(share, best)
    low, high = interval or (None, None)
    note = "" if interval is None or share is None else f"[{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"
    return Cell(cell.text, (*cell.values, low, high, *more), note, numeric=True, best=best)


# ------------------------------------------------------------------------------------------------------ tables


def results_table(config: Config, runs: Sequence[Run]) -> Table:
    """One row a pretraining run, like the paper's Table 1; chance in the footer."""
    tasks = list(config.evaluate)
    keys = ["run", "mask", "ratio", "epochs", "final_loss"]
    keys += [f"{task}_{part}" for task in tasks for part in ("top1", "low", "high")]
    columns = ["Run", "Mask", "Ratio", "Epochs", "Final loss"] + [f"{title(task)}, top-1 %" for task in tasks]
    found = {task: [run.evaluations[task] for run in runs if task in run.evaluations] for task in tasks}
    best = {task: max((e.top1 for e in found[task]), default=math.nan) for task in tasks}
    footer = [Cell("Chance", ("chance",))] + [Cell("", (None,))] * 4
    footer += [estimate(found[task][0].chance if found[task] else None, None) for task in tasks]
    shown = [footer] if any(found.values()) else []
    return Table("results", columns, keys, [_result_row(run, tasks, best) for run in runs], shown)


def title(task: str) -> str:
    """`finetune` -> `Fine-tuning`; other evaluations by their own name."""
    return {"linear": "Linear probe", "finetune": "Fine-tuning"}.get(task, task)


def _result_row(run: Run, tasks: Sequence[str], best: dict[str, float]) -> list[Cell]:
    strategy, ratio = run.mask
    row = [words(run.name), words(strategy), number(ratio, 2), count(run.settings.optimisation.epochs)]
    row.append(number(run.final_loss, 4))
    for task in tasks:
        found = run.evaluations.get(task)
        if found is None:
            row.append(estimate(None, None))
        else:
            row.append(estimate(found.top1, found.interval, found.top1 == best[task]))
    return row


def per_class_table(config: Config, runs: Sequence[Run]) -> Table:
    """Accuracy of each class, one column a run."""
    rows = []
    for task in config.evaluate:
        found = {run.name: run.evaluations[task].per_class for run in runs if task in run.evaluations}
        for label in sorted({label for classes in found.values() for label in classes}):
            cells = [percent(found.get(run.name, {}).get(label)) for run in runs]
            rows.append([Cell(title(task), (task,)), words(label), *cells])
    names = [run.name for run in runs]
    return Table("per_class", ["Evaluation", "Class", *names], ["evaluation", "class", *names], rows)


def mask_quality_table(rows: Sequence[MaskQualityRow]) -> Table:
    """One row a guide and ratio; one column a kind of camera, with the interval."""
    cameras = sorted({row.camera for row in rows})
    # Only masks of the same ratio can be compared: the more is hidden, the more of the box is.
    best: dict[tuple[str, float], float] = {}
    for row in rows:
        best[row.camera, row.ratio] = max(row.coverage, best.get((row.camera, row.ratio), 0.0))
    keys = ["guide", "source", "ratio", "chance"]
    keys += [f"{camera}_{part}" for camera in cameras for part in ("coverage", "low", "high", "clips")]
    columns = ["Mask by", "Captions", "Ratio", "Chance, %"] + [camera_title(camera) + ", %" for camera in cameras]
    lines = []
    for guide, source, ratio in dict.fromkeys((row.guide, row.source, row.ratio) for row in rows):
        group = {r.camera: r for r in rows if (r.guide, r.source, r.ratio) == (guide, source, ratio)}
        line = [words(guide), words(source), number(ratio, 2), percent(next(iter(group.values())).chance)]
        for camera in cameras:
            found = group.get(camera)
            if found is None:
                line.append(estimate(None, None, False, None))
            else:
                line.append(
                    estimate(found.coverage, found.interval, found.coverage == best[camera, ratio], found.clips)
                )
        lines.append(line)
    return Table("mask_quality", columns, keys, lines)


def camera_title(camera: str) -> str:
    return {"fixed": "Fixed camera", "moving": "Moving camera", "all": "All clips"}.get(camera, camera)


def quarantine_table(refusals: Sequence[Refusal]) -> Table:
    """Every clip that some stage did not call `ok`."""
    columns = ["Stage", "Clip", "File", "Status", "Policy", "Kept", "Detail"]
    keys = ["stage", "video_id", "path", "status", "policy", "kept", "detail"]
    rows = [
        [
            *(words(text) for text in (r.stage, r.video_id, r.path, r.status, r.policy)),
            Cell("yes" if r.kept else "no", (r.kept,)),
            words(r.detail),
        ]
        for r in refusals
    ]
    return Table("quarantine", columns, keys, rows)
