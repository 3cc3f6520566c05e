"""The tables: built once as rows of cells, written as CSV and Markdown, and shown on the page."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from stm.config import Config
from stm.evaluation.task import Metric
from stm.evaluation.tasks import TASKS
from stm.report.results.records import MaskQualityRow, Measured, Refusal, RunGroup, best_mean

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


def measured(cell: Measured | None, best: float = math.nan, seeds: int | None = None) -> Cell:
    """A number over seeds; the CSV gets mean, deviation, number of seeds, and the interval of a single one.

    Args:
        best: the mean of this value is the best of its column.
        seeds: how many there shall be; fewer are noted.
    """
    if cell is None:
        return Cell(MISSING, (None,) * 5, numeric=True)
    scale = cell.scale
    text, note = f"{scale * cell.mean:.1f}", ""
    low, high = cell.interval or (None, None)
    if cell.deviation is not None:
        text += f" ± {scale * cell.deviation:.1f}"
    elif low is not None and high is not None:
        note = f"[{scale * low:.1f}, {scale * high:.1f}]"
    if seeds is not None and len(cell.values) < seeds:
        note = f"{note} {len(cell.values)} of {seeds} seeds".strip()
    values = (cell.mean, cell.deviation, len(cell.values), low, high)
    return Cell(text, values, note, numeric=True, best=cell.mean == best)


# ------------------------------------------------------------------------------------------------------ tables


def results_table(
    config: Config,
    groups: Sequence[RunGroup],
    chances: Mapping[str, float],
    tasks: Sequence[str] | None = None,
) -> Table:
    """One row a pretraining run, like the paper's Table 1, its seeds averaged; chance in the footer.

    Args:
        chances: chance level of each evaluation that has been done.
        tasks: only these evaluations; all when not given.
    """
    chosen = list(config.evaluate) if tasks is None else list(tasks)
    keys = ["run", "dataset"] if config.datasets else ["run"]
    keys += ["mask", "ratio", "epochs", "final_loss", "final_loss_deviation"]
    keys += [
        f"{task}_{part}"
        for task in chosen
        for part in (headline_of(config, task).key, "deviation", "seeds", "low", "high")
    ]
    columns = ["Run", "Dataset"] if config.datasets else ["Run"]
    columns += ["Mask", "Ratio", "Epochs", "Final loss", *(column_title(config, task) for task in chosen)]
    best = {task: best_mean(found for group in groups if (found := group.score(task))) for task in chosen}
    footer = [
        Cell("Chance", ("chance",)),
        *[Cell("", (None,))] * (len(columns) - len(chosen) - 2),
        Cell("", (None, None)),
    ]
    footer += [_chance(chances.get(task), headline_of(config, task).scale) for task in chosen]
    rows = [_result_row(config, group, chosen, best) for group in groups]
    return Table("results", columns, keys, rows, [footer] if any(task in chances for task in chosen) else [])


def _result_row(config: Config, group: RunGroup, tasks: Sequence[str], best: Mapping[str, float]) -> list[Cell]:
    strategy, ratio = group.mask
    row = [words(group.name), *([words(group.settings.dataset or "")] if config.datasets else [])]
    row += [words(strategy), number(ratio, 2), count(group.settings.optimisation.epochs), _loss(group.final_loss)]
    seeds = len(group.instances)
    return row + [measured(group.score(task), best[task], seeds) for task in tasks]


def _loss(found: Measured | None) -> Cell:
    if found is None:
        return Cell(MISSING, (None, None), numeric=True)
    spread = "" if found.deviation is None else f" ± {found.deviation:.4f}"
    return Cell(f"{found.mean:.4f}{spread}", (found.mean, found.deviation), numeric=True)


def _chance(level: float | None, scale: float) -> Cell:
    text = MISSING if level is None else f"{scale * level:.1f}"
    return Cell(text, (level, None, None, None, None), numeric=True)


def title(task: str) -> str:
    """`finetune` -> `Fine-tuning`; evaluations that are not named after their task, by their own name."""
    return TASKS[task].title if task in TASKS else task


def headline_of(config: Config, task: str) -> Metric:
    """The number of an evaluation that is shown first."""
    return TASKS[config.evaluate[task].task].headline


def column_title(config: Config, task: str) -> str:
    """`Linear probe, top-1 %`."""
    headline = headline_of(config, task)
    return f"{title(task)}, {headline.label} {headline.unit}".rstrip()


def per_class_table(config: Config, groups: Sequence[RunGroup]) -> Table:
    """Accuracy of each class, one column a run, the mean over its seeds."""
    rows = []
    for task in config.evaluate:
        found = {group.name: group.class_accuracy(task) for group in groups}
        for label in sorted({label for classes in found.values() for label in classes}):
            cells = [percent(found[group.name].get(label)) for group in groups]
            rows.append([Cell(title(task), (task,)), words(label), *cells])
    names = [group.name for group in groups]
    return Table("per_class", ["Evaluation", "Class", *names], ["evaluation", "class", *names], rows)


def mask_quality_table(rows: Sequence[MaskQualityRow]) -> Table:
    """One row a guide and ratio; one column a kind of camera, with the interval."""
    cameras = sorted({row.camera for row in rows})
    named = any(row.dataset for row in rows)
    # Only masks of the same ratio can be compared: the more is hidden, the more of the box is.
    best: dict[tuple[str, str, float], float] = {}
    for row in rows:
        place = row.dataset, row.camera, row.ratio
        best[place] = max(row.coverage, best.get(place, 0.0))
    keys = [*(["dataset"] if named else []), "guide", "source", "ratio", "chance"]
    keys += [f"{camera}_{part}" for camera in cameras for part in ("coverage", "low", "high", "clips")]
    columns = [*(["Dataset"] if named else []), "Mask by", "Captions", "Ratio", "Chance, %"]
    columns += [camera_title(camera) + ", %" for camera in cameras]
    lines = []
    for dataset, guide, source, ratio in dict.fromkeys((row.dataset, row.guide, row.source, row.ratio) for row in rows):
        group = {
            r.camera: r for r in rows if (r.dataset, r.guide, r.source, r.ratio) == (dataset, guide, source, ratio)
        }
        line = [words(dataset)] if named else []
        line += [words(guide), words(source), number(ratio, 2), percent(next(iter(group.values())).chance)]
        for camera in cameras:
            found = group.get(camera)
            if found is None:
                line.append(estimate(None, None, False, None))
            else:
                is_best = found.coverage == best[dataset, camera, ratio]
                line.append(estimate(found.coverage, found.interval, is_best, found.clips))
        lines.append(line)
    return Table("mask_quality", columns, keys, lines)


def camera_title(camera: str) -> str:
    return {"fixed": "Fixed camera", "moving": "Moving camera", "all": "All clips"}.get(camera, camera)


def quarantine_table(refusals: Sequence[Refusal], datasets: Sequence[str] | None = None) -> Table:
    """Every clip that some stage did not call `ok`.

    Args:
        datasets: the dataset of each refusal, where there are several.
    """
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
    if datasets is not None:
        columns, keys = ["Dataset", *columns], ["dataset", *keys]
        rows = [[words(name), *row] for name, row in zip(datasets, rows, strict=True)]
    return Table("quarantine", columns, keys, rows)
