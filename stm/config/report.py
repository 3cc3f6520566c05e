"""Report settings: tables and figures as in a paper, the report page, prices for the plan."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Tag, model_validator

from stm.config.base import Name, Section, field

# The guides whose masks are measured; see `stm.evaluation.masks.box_coverage.GUIDES`.
MaskGuide = Literal["text_top", "motion", "motion_minus_camera", "random"]

# Where a published number was read: in the paper, its release or repository (`source`), in notes on the paper
# (`second_hand`), or on a site that collects results (`aggregator`).
Certainty = Literal["source", "second_hand", "aggregator"]


class TableColumn(Section):
    """A column of a table: one metric of one evaluation."""

    title: str
    task: Name = field(..., "name of an evaluation")
    metric: str | None = field(
        None, "a metric in its metrics.json, such as top5 or text_to_video.r1; by default the task's headline metric"
    )


class TableRow(Section):
    """A row of a table: the metrics of one run, or of one run per column, averaged over seeds."""

    label: str
    runs: Name | tuple[Name | None, ...] = field(..., "a pretraining run, or one per column (null: empty cell)")
    paper: tuple[float | None, ...] = field((), "the paper's numbers, one per column, shown beside ours")
    certainty: Certainty | tuple[Certainty | None, ...] | None = field(
        None, "where the numbers in `paper` were read, for all or one per column; by default the table's"
    )

    def run_of(self, column: int) -> str | None:
        return self.runs if isinstance(self.runs, str) else self.runs[column]


class TableSpec(Section):
    """A table of a paper; `snakemake <its name>` makes it with everything it depends on."""

    title: str
    columns: tuple[TableColumn, ...] = field(..., "columns", min_length=1)
    rows: tuple[TableRow, ...] = field(..., "rows", min_length=1)
    certainty: Certainty | None = field(
        None,
        "where the numbers in `paper` were read: in the `source` (the paper, its release or repository), at `second_hand` (notes "
        "on the paper), or at an `aggregator` (a site that collects results). A mark beside each number shows it",
    )
    note: str | None = field(None, "a note below the table, such as which of the paper's numbers are doubtful")

    @model_validator(mode="after")
    def _check_row_lengths(self) -> "TableSpec":
        for row in self.rows:
            for what, values in (("runs", row.runs), ("paper", row.paper), ("certainty", row.certainty)):
                if values and not isinstance(values, str) and len(values) != len(self.columns):
                    raise ValueError(f"row {row.label!r} has {len(values)} {what} for {len(self.columns)} columns")
        return self

    def published(self, row: TableRow, column: int) -> tuple[float | None, Certainty | None]:
        """The paper's number in a cell, and where it was read; both are None if there is no number."""
        value = row.paper[column] if row.paper else None
        if value is None:
            return None, None
        own = row.certainty if row.certainty is None or isinstance(row.certainty, str) else row.certainty[column]
        return value, own or self.certainty

    def cells(self) -> set[tuple[str, str]]:
        """The (run, evaluation) pairs in the table."""
        pairs = ((row.run_of(i), column.task) for row in self.rows for i, column in enumerate(self.columns))
        return {(run, task) for run, task in pairs if run is not None}


class FigureSpec(Section):
    """A figure of a paper; `snakemake <its name>` makes it with everything it depends on."""

    title: str
    kind: Literal["clips", "losses", "bars", "persistence"] = field(
        ...,
        "`clips`: frames of clips, with the rows in `show`; `losses`: curves of `metric`; `bars`: metrics of `tasks`; "
        "`persistence`: how long objects stay kept, a panel for each of `tasks`, which are evaluations of mask_persistence",
    )
    runs: dict[str, Name] = field(..., "pretraining runs by their label in the figure", min_length=1)
    show: tuple[Literal["frames", "similarity", "guides", "masks", "reconstructions", "attention"], ...] = field(
        ("frames", "masks"),
        "`clips`: the rows; all but `frames` once per run. `guides`: what a mask of umt, stm or clusterstm "
        "is computed from, such as STM's points and blobs",
    )
    clips: int = field(2, "`clips`: number of clips", "clips", ge=1, le=16)
    metric: str | None = field(
        None,
        "`losses`: a metric in metrics.jsonl, such as reconstruction or contrast, by default loss; `bars`: a metric in the "
        "evaluations' metrics.json, by default the tasks' headline metrics",
    )
    tasks: tuple[Name, ...] = field((), "`bars`, `persistence`: names of evaluations")

    @model_validator(mode="after")
    def _check_tasks(self) -> "FigureSpec":
        if (self.kind in ("bars", "persistence")) != bool(self.tasks):
            raise ValueError(
                "the kinds `bars` and `persistence` require at least one of `tasks`; other kinds do not take `tasks`"
            )
        return self

    def cells(self) -> set[tuple[str, str]]:
        """The (run, evaluation) pairs in the figure."""
        return {(run, task) for run in self.runs.values() for task in self.tasks}


class _Expectation(Section):
    """A sentence, and the statement that checks it; exactly one of `above` and `below`."""

    says: str = field(..., "what is expected, as a sentence for the page", min_length=1)

    @model_validator(mode="after")
    def _check_bound(self) -> "_Expectation":
        above, below = getattr(self, "above", None), getattr(self, "below", None)
        if (above is None) == (below is None):
            raise ValueError("give either `above` or `below`")
        return self


class ExpectedScore(_Expectation):
    """An expected metric of an evaluation of a run."""

    run: Name = field(..., "a pretraining run")
    evaluation: Name = field(..., "an evaluation of the run")
    metric: str | None = field(
        None,
        "a metric in its metrics.json, such as dual_encoder.text_to_video.r10; by default the task's headline metric",
    )
    above: float | Name | None = field(
        None, "lower bound: `chance`, another run, or a number as in metrics.json (0.3 for 30 %)"
    )
    below: float | Name | None = field(None, "upper bound, as `above`")


class ExpectedCoverage(_Expectation):
    """An expected share of the captioned object's true box that a guide's masks hide (`mask_quality`)."""

    guide: MaskGuide = field(..., "what the masks are made by")
    camera: Literal["fixed", "moving"] = field(..., "the clips: those with a fixed or with a moving camera")
    source: Name | None = field(None, "`text_top`: the caption source; by default the first packed one")
    ratio: float | None = field(
        None,
        "the mask ratio; by default mask_quality.text_ratio for `text_top` and `random`, else motion_ratio",
        gt=0,
        lt=1,
    )
    dataset: Name | None = field(None, "the dataset, if there are several")
    above: float | MaskGuide | Literal["chance"] | None = field(
        None, "lower bound: `chance`, another guide at the same ratio, or a number from 0 to 1"
    )
    below: float | MaskGuide | Literal["chance"] | None = field(None, "upper bound, as `above`")


def _kind_of(expectation: Any) -> str:
    """Return the section of an expectation: that of a mask names a guide."""
    names = expectation if isinstance(expectation, Mapping) else getattr(expectation, "model_fields_set", ())
    return "ExpectedCoverage" if "guide" in names else "ExpectedScore"


Expectation = Annotated[
    Annotated[ExpectedScore, Tag("ExpectedScore")] | Annotated[ExpectedCoverage, Tag("ExpectedCoverage")],
    Discriminator(_kind_of),
]


class Report(Section):
    """The report page of a config."""

    title: str = field("stm: masked video pretraining", "title of the page")
    clips: int = field(4, "clips shown with frames, maps, masks and reconstructions", "clips", ge=0, le=64)
    expect: tuple[Expectation, ...] = field(
        (), "what the study is expected to show; the page compares it with what came out"
    )
    split: Name = field("test", "split that the shown clips come from; if it has no clips, the first split that does")


GpuName = Literal["b200", "h200", "h100", "h100-pcie", "a100", "a100-40gb", "l40s", "rtx-4090"]


class Prices(Section):
    """The hardware that the plan assumes, and prices of machine time."""

    gpu: GpuName = field("h200", "GPU for which hours and memory are estimated; stm/plan/hardware.py has their peaks")
    gpu_share: float = field(
        0.32, "assumed share of the GPU's published peak that networks reach; small ones reach less", gt=0, le=1
    )
    gpus: int | None = field(
        None, "GPUs that all jobs share, for the wall-clock; by default as many as the largest run uses", "GPUs", ge=1
    )
    cores: int = field(64, "CPU cores that all jobs share, for the wall-clock", "cores", ge=1)
    cpu_core_hour: float = field(0.0, "price per core-hour", "currency", ge=0)
    gpu_hour: float = field(0.0, "price per GPU-hour", "currency", ge=0)
