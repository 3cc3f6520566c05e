"""What a report shows: tables as in a paper, figures, the page."""

from typing import Literal

from pydantic import model_validator

from stm.config.base import Name, Section, field


class TableColumn(Section):
    """A column: one number of one evaluation."""

    title: str
    task: Name = field(..., "an evaluation")
    metric: str | None = field(
        None, "a number of its metrics.json, such as top5 or text_to_video.r1; its headline when not given"
    )


class TableRow(Section):
    """A row: the run, or for each column the run, whose numbers it holds; several seeds are averaged."""

    label: str
    runs: Name | tuple[Name | None, ...] = field(..., "a pretraining run, or one a column (null: nothing)")
    paper: tuple[float | None, ...] = field((), "the paper's numbers, one a column, shown beside ours")

    def run_of(self, column: int) -> str | None:
        return self.runs if isinstance(self.runs, str) else self.runs[column]


class TableSpec(Section):
    """A table of a paper; `snakemake <its name>` makes it and all that it needs."""

    title: str
    columns: tuple[TableColumn, ...] = field(..., "columns", min_length=1)
    rows: tuple[TableRow, ...] = field(..., "rows", min_length=1)
    note: str | None = field(None, "what a reader must know, such as which of the paper's numbers are doubtful")

    @model_validator(mode="after")
    def _is_rectangular(self) -> "TableSpec":
        for row in self.rows:
            for what, values in (("runs", row.runs), ("paper", row.paper)):
                if not isinstance(values, str) and values and len(values) != len(self.columns):
                    raise ValueError(f"row {row.label!r} has {len(values)} {what} for {len(self.columns)} columns")
        return self

    def cells(self) -> set[tuple[str, str]]:
        """The (run, evaluation) pairs that it needs."""
        named = ((row.run_of(i), column.task) for row in self.rows for i, column in enumerate(self.columns))
        return {(run, task) for run, task in named if run is not None}


class FigureSpec(Section):
    """A figure of a paper; `snakemake <its name>` makes it and all that it needs."""

    title: str
    kind: Literal["clips", "losses", "bars"] = field(
        ...,
        "`clips`: pictures of clips, in rows as `show` says; `losses`: curves of `metric`; `bars`: numbers of `tasks`",
    )
    runs: dict[str, Name] = field(..., "pretraining runs by what they are called in the figure", min_length=1)
    show: tuple[Literal["frames", "similarity", "guides", "masks", "reconstructions", "attention"], ...] = field(
        ("frames", "masks"),
        "`clips`: the rows; all but `frames` once a run. `guides`: what a mask of umt, stm or clusterstm is made from, such "
        "as STM's points and blobs",
    )
    clips: int = field(2, "`clips`: how many", "clips", ge=1, le=16)
    metric: str = field("loss", "`losses`: a name in metrics.jsonl, such as loss, reconstruction or contrast")
    tasks: tuple[Name, ...] = field((), "`bars`: evaluations")

    @model_validator(mode="after")
    def _has_tasks(self) -> "FigureSpec":
        if (self.kind == "bars") != bool(self.tasks):
            raise ValueError("`tasks` belongs to the kind `bars`, which needs one or more")
        return self

    def cells(self) -> set[tuple[str, str]]:
        """The (run, evaluation) pairs that it needs."""
        return {(run, task) for run in self.runs.values() for task in self.tasks}


class Report(Section):
    """The page."""

    title: str = field("stm: masked video pretraining", "title of the page")
    clips: int = field(4, "clips shown with frames, maps, masks and reconstructions", "clips", ge=0, le=64)
    split: Name = field("test", "split the shown clips are taken from; the first split with clips when it has none")


class Prices(Section):
    """What machine time costs, for the plan."""

    cpu_core_hour: float = field(0.0, "price of a core for an hour", "currency", ge=0)
    gpu_hour: float = field(0.0, "price of a GPU for an hour", "currency", ge=0)
