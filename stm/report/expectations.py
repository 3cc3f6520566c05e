"""The config's expectations (`report.expect`) beside what came out."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stm.config.report import ExpectedCoverage, ExpectedScore
from stm.report.comparison import Entry, side
from stm.report.pairs import UNREADABLE, Difference, NotPairedError, compare_runs, seed_of
from stm.report.results.evaluations import ReportError, read_measurement
from stm.report.results.records import Measurement, RunGroup, Study
from stm.report.tables import MISSING, Cell, Table, camera_title, column_title, metric_of, text_cell

OUTCOMES = ("held", "not told apart", "did not hold", "not measured")


@dataclass(frozen=True)
class Comparison:
    """An expected comparison of two numbers; a number of None was not measured."""

    what: str  # the number that is compared
    scale: float
    measured: Entry | None
    limit: str  # the name of the number that it is compared with; empty if the config gives the number
    bound: Entry | None  # that number; chance and numbers of the config have intervals of no width
    above: bool  # whether the measured number is expected above the bound, or below it
    pairs: Difference | None = None  # of two runs: measured minus bound on the same test clips; None: not paired
    unpaired: str = ""  # of two runs: why not, in few words

    @property
    def outcome(self) -> str:
        """One of `OUTCOMES`.

        Two runs are compared by the 95 % interval of their difference, if they are paired: the expectation held if it lies
        wholly on the expected side of 0; it did not hold if it lies wholly on the other side. Otherwise, the measured interval
        and the bound's are compared in the same way. Runs whose difference may be 0, and numbers whose intervals touch, or that
        have none, are not told apart.
        """
        if self.measured is None or self.bound is None:
            return "not measured"
        sign = side(self.measured.interval, self.bound.interval) if self.pairs is None else self.pairs.sign
        if sign == 0:
            return "not told apart"
        return "held" if (sign > 0) == self.above else "did not hold"

    @property
    def decided_by(self) -> str:
        """What decides the outcome: `pairs` or `intervals`; empty if nothing was measured."""
        if self.measured is None or self.bound is None:
            return ""
        return "intervals" if self.pairs is None else "pairs"


def expectations_table(study: Study, groups: Sequence[RunGroup]) -> Table:
    """Build the table of expectations: the sentence, the outcome, both numbers and their difference with 95 % intervals."""
    by_name = {group.name: group for group in groups}
    rows = []
    for expected in study.config.report.expect:
        if isinstance(expected, ExpectedScore):
            found = _compare_scores(study, by_name, expected)
        else:
            found = _compare_coverage(study, expected)
        bound = _number_cell(found.bound, found.scale)
        direction = "above" if found.above else "below"
        words = " ".join(filter(None, (direction, found.limit, bound.text)))
        rows.append(
            [
                text_cell(expected.says),
                text_cell(found.outcome),
                _number_cell(found.measured, found.scale),
                Cell(words, (direction, found.limit, *bound.values), bound.note),
                _difference_cell(found),
                text_cell(found.what),
            ]
        )
    columns = ["Expected", "Outcome", "Came out", "Expected to be", "Difference", "Number"]
    keys = ["expected", "outcome", "value", "low", "high", "direction", "bound"]
    keys += [f"bound_{part}" for part in ("value", "low", "high")]
    keys += ["difference", "difference_low", "difference_high", "decided_by", "number"]
    return Table("expectations", columns, keys, rows)


def count_outcomes(table: Table) -> str:
    """Count the outcomes of an expectations table: `Of 4 expectations, 3 held, 1 is not told apart.`"""
    counts = Counter(row[1].text for row in table.rows)
    parts = []
    for outcome in OUTCOMES:
        if number := counts[outcome]:
            verb = ("is " if number == 1 else "are ") if outcome.startswith("not ") else ""
            parts.append(f"{number} {verb}{outcome}")
    total = len(table.rows)
    return f"Of {total} expectation{'s' if total > 1 else ''}, {', '.join(parts)}." if parts else ""


def _compare_scores(study: Study, groups: Mapping[str, RunGroup], expected: ExpectedScore) -> Comparison:
    config, task = study.config, expected.evaluation
    limit = expected.above if expected.below is None else expected.below
    score = _measure(study, groups, expected.run, expected)
    pairs, unpaired = None, ""
    bound: Entry | None
    if not isinstance(limit, str):
        bound = _fixed(limit)
    elif limit == "chance":
        bound = _fixed(score.chance if score else None)
    else:
        other = _measure(study, groups, limit, expected)
        bound = other.entry(limit) if other else None
        if score and other:
            pairs, unpaired = _pair(study, expected, groups[expected.run], groups[limit])
    metric = metric_of(config, task, expected.metric)
    return Comparison(
        what=f"{expected.run}: {column_title(config, task, expected.metric)}",
        scale=metric.scale,
        measured=score.entry(expected.run) if score else None,
        limit=limit if isinstance(limit, str) else "",
        bound=bound,
        above=expected.below is None,
        pairs=pairs,
        unpaired=unpaired,
    )


def _measure(study: Study, groups: Mapping[str, RunGroup], run: str, expected: ExpectedScore) -> Measurement | None:
    """A run's number over the seeds that have been evaluated; None if none has, or if they lack the metric."""
    group, task = groups.get(run), expected.evaluation
    headline = group.score(task) if group else None
    if group is None or headline is None or expected.metric is None:
        return headline
    evaluated = [instance.name for instance in group.instances if task in instance.evaluations]
    try:
        return read_measurement(study.config, run, task, expected.metric, evaluated)
    except ReportError as error:
        study.own.problems.append(f"{task} of {run}: {error}")
        return None


def _pair(study: Study, expected: ExpectedScore, first: RunGroup, second: RunGroup) -> tuple[Difference | None, str]:
    """The paired difference of two measured runs; None, and why not in few words, if they cannot be paired.

    Of runs with several seeds, at least two must be common: one says nothing about other seeds, unlike the runs' intervals.
    """
    config, task = study.config, expected.evaluation
    seeds = [
        {seed_of(config, run.name) for run in group.instances if task in run.evaluations} for group in (first, second)
    ]
    common = seeds[0] & seeds[1]
    if len(common) < min(2, max(map(len, seeds))):
        return None, f"{len(common) or 'no'} common seed"
    try:
        return compare_runs(config, task, [first.name, second.name], expected.metric, common), ""
    except NotPairedError as error:
        if error.reason == UNREADABLE:
            study.own.problems.append(f"{task} of {first.name} and {second.name}: {error}")
        return None, error.reason


def _compare_coverage(study: Study, expected: ExpectedCoverage) -> Comparison:
    measured_on = [name for name in study.config.dataset_names if study.config.of(name).mask_quality is not None]
    config = study.config.of(expected.dataset or measured_on[0])
    quality = config.mask_quality
    assert quality is not None, "checked by the config"
    by_text = expected.guide in ("text_top", "random")
    ratio = expected.ratio or (quality.text_ratio if by_text else quality.motion_ratio)
    source = expected.source or next(iter(config.pack.sources or config.captions), "")
    rows = [row for row in study.mask_quality if row.dataset == (config.name if study.several else "")]
    rows = [row for row in rows if (row.camera, row.ratio) == (expected.camera, ratio) and row.source in ("", source)]
    by_guide = {row.guide: row for row in rows}
    row = by_guide.get(expected.guide)
    limit = expected.above if expected.below is None else expected.below
    bound: Entry | None
    if not isinstance(limit, str):
        bound = _fixed(limit)
    elif limit == "chance":
        bound = _fixed(row.chance if row else None)
    else:
        bound = by_guide[limit].entry() if limit in by_guide else None
    name = row.entry().name if row else expected.guide
    return Comparison(
        what=f"{name}: {camera_title(expected.camera).lower()}, ratio {ratio:g}, hidden share %",
        scale=100.0,
        measured=row.entry() if row else None,
        limit=limit if isinstance(limit, str) else "",
        bound=bound,
        above=expected.below is None,
    )


def _fixed(value: float | None) -> Entry | None:
    return None if value is None else Entry("", value, (value, value))


def _difference_cell(found: Comparison) -> Cell:
    pairs, scale = found.pairs, found.scale
    if pairs is None:
        note = f"not paired: {found.unpaired}" if found.unpaired else ""
        return Cell(MISSING, (None, None, None, found.decided_by), note, numeric=True)
    seeds = f"{pairs.seeds} seed{'s' if pairs.seeds > 1 else ''}"
    note = f"[{scale * pairs.low:.1f}, {scale * pairs.high:.1f}] paired, {seeds}"
    values = pairs.value, pairs.low, pairs.high, found.decided_by
    return Cell(f"{scale * pairs.value:+.1f}", values, note, numeric=True)


def _number_cell(entry: Entry | None, scale: float) -> Cell:
    if entry is None:
        return Cell(MISSING, (None, None, None), numeric=True)
    low, high = entry.interval or (None, None)
    note = "" if low is None or high is None or low == high else f"[{scale * low:.1f}, {scale * high:.1f}]"
    return Cell(f"{scale * entry.value:.1f}", (entry.value, low, high), note, numeric=True)
