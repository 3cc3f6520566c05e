"""`stm compare`: the numbers of two results folders side by side, and which of them differ.

Two numbers differ if the 95 % interval of their difference does not contain 0. It is computed from their own intervals
(MOVER, Zou and Donner 2008), as if they were independent. Results of one config share their test clips and seeds, which makes
the interval wider than it must be: a difference that is found is one. Of many numbers, some differ by chance, one in twenty at
most; `far` are those that differ even if the interval is widened for the number of comparisons (Bonferroni).
"""

import math
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

from stm.config import Section
from stm.layout import Layout
from stm.report.pairs import count
from stm.report.reference import ComparisonError, read_provenance, read_rows, without_folders
from stm.stages.provenance import show

# What identifies a row of a table; rows of the config's own tables are identified by their label.
_ROW_KEYS = {
    "results": ("run", "dataset"),
    "mask_quality": ("dataset", "guide", "source", "ratio"),
}
# Which compare numbers of other tables, or hold none with an interval.
_LEFT_OUT = ("expectations", "per_class", "quarantine")
_NOT_DECISIVE = ("results", "report", "prices", "figures")  # keys of the config that do not change numbers
_DIVISION = {"processes", "nodes", "parallel"}  # change numbers by rounding alone
_SHOWN = 5  # differing keys of the config in a message

VERDICTS = ("agrees", "differs", "far", "missing", "new")


@dataclass(frozen=True)
class Number:
    """A number of a table with its 95 % interval, before scaling."""

    value: float
    low: float
    high: float
    seeds: int | None  # None: the table does not count them


Place = tuple[str, str, str]  # table, row, column


@dataclass(frozen=True)
class Difference:
    """A number of each folder, and the 95 % interval of their difference; None: one of them has no such number."""

    place: Place
    mine: Number | None
    reference: Number | None
    verdict: str = ""  # one of `VERDICTS`

    @property
    def value(self) -> float:
        assert self.mine is not None and self.reference is not None
        return self.mine.value - self.reference.value

    @property
    def interval(self) -> tuple[float, float]:
        """The interval of the difference; half its width is the root of the sum of squares of the numbers' halves."""
        assert self.mine is not None and self.reference is not None
        mine, other = self.mine, self.reference
        below = math.hypot(mine.value - mine.low, other.high - other.value)
        above = math.hypot(mine.high - mine.value, other.value - other.low)
        return self.value - below, self.value + above


def read_numbers(folder: Path) -> dict[Place, Number]:
    """Read all numbers with an interval from the tables of a results folder.

    Raises:
        ComparisonError: there are no tables, or one is damaged.
    """
    paths = sorted(Layout(folder).tables.glob("*.csv"))
    if not paths:
        raise ComparisonError(
            f"{Layout(folder).tables}: has no tables (*.csv); run `snakemake` with the study's --configfile, which writes them "
            "with the report"
        )
    numbers: dict[Place, Number] = {}
    for path in paths:
        if path.stem not in _LEFT_OUT:
            header, rows = read_rows(path)
            found: Counter[str] = Counter()
            for row in rows:
                cells = dict(zip(header, row, strict=True))
                name = " ".join(cells[key] for key in _ROW_KEYS.get(path.stem, ("row",)) if cells.get(key))
                found[name] += 1
                if found[name] > 1:  # rows of a config's table may have equal labels
                    name = f"{name} ({found[name]})"
                try:
                    numbers |= {(path.stem, name, column): number for column, number in _read_row(header, row)}
                except ValueError as error:
                    raise ComparisonError(f"{path}: row {name!r}: {error}; make the report again") from error
    return numbers


def _read_row(header: Sequence[str], row: Sequence[str]) -> Iterator[tuple[str, Number]]:
    """Yield the numbers of a row with an interval: X, [X_deviation, X_seeds,] X_low and X_high follow each other.

    Raises:
        ValueError: a cell is not a finite number.
    """
    for place, key in enumerate(header):
        stem = key.removesuffix("_low")
        if stem == key or f"{stem}_high" not in header[place + 1 : place + 2]:
            continue
        seeds = None
        at = place - 1
        if header[at] == f"{stem}_seeds":
            seeds, at = int(_finite(header[at], row[at] or "0")), at - 2  # before the seeds: the deviation
        if row[at] and row[place] and row[place + 1]:
            value, low, high = (_finite(header[column], row[column]) for column in (at, place, place + 1))
            yield header[at].removesuffix("_mean"), Number(value, low, high, seeds)


def _finite(column: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{column} is {text!r} instead of a finite number")
    return value


def compare(mine: Mapping[Place, Number], reference: Mapping[Place, Number]) -> list[Difference]:
    """Compare the numbers of two folders, in the order of the reference's; those that only one has come last."""
    places = [place for place in reference if place in mine]
    pairs = [Difference(place, mine[place], reference[place]) for place in places]
    widening = _widen(len(pairs))
    compared = [Difference(pair.place, pair.mine, pair.reference, _judge(pair, widening)) for pair in pairs]
    compared += [Difference(place, None, reference[place], "missing") for place in reference if place not in mine]
    return compared + [Difference(place, mine[place], None, "new") for place in mine if place not in reference]


def _widen(comparisons: int) -> float:
    """The factor by which a 95 % interval widens so that in all comparisons together one of twenty leaves its own."""
    normal = NormalDist()
    return normal.inv_cdf(1 - 0.025 / max(1, comparisons)) / normal.inv_cdf(0.975)


def _judge(pair: Difference, widening: float) -> str:
    low, high = pair.interval
    if low <= 0 <= high:
        return "agrees"
    # Widened about the difference, which keeps an asymmetric interval asymmetric.
    low, high = (pair.value + widening * (bound - pair.value) for bound in (low, high))
    return "differs" if low <= 0 <= high else "far"


def config_differences(mine: Mapping[str, Any], reference: Mapping[str, Any]) -> list[str]:
    """List the keys that both configs have and on which numbers depend, with both values, where they differ.

    Keys that only one has are of another version, or of runs and evaluations that the other lacks. Of paths, the last names
    are compared.

    Args:
        mine, reference: the configs as in `provenance.json`.
    """
    neutral = _neutral_keys()
    found: list[tuple[str, Any, Any]] = []
    for key in [key for key in mine if key in reference and key not in {*neutral, *_NOT_DECISIVE}]:
        found += _changed(key, without_folders(mine[key]), without_folders(reference[key]), neutral)
    return [f"{key} is {show(own)}, in the reference {show(other)}" for key, own, other in found]


def _changed(path: str, own: Any, other: Any, neutral: Container[str]) -> Iterator[tuple[str, Any, Any]]:
    """Yield the innermost keys with different values; a section that only one of both has is such a value."""
    if isinstance(own, Mapping) and isinstance(other, Mapping):
        for key in own:
            if key in other and key not in neutral:
                yield from _changed(f"{path}.{key}", own[key], other[key], neutral)
    elif isinstance(own, list) and isinstance(other, list) and any(isinstance(part, Mapping) for part in own + other):
        if len(own) != len(other):
            yield path, own, other
        for number, (part, theirs) in enumerate(zip(own, other, strict=False)):
            yield from _changed(f"{path}.{number}", part, theirs, neutral)
    elif own != other:
        yield path, own, other


def _neutral_keys() -> set[str]:
    """The keys of all sections that change no number."""
    sections, found = [Section], set[str]()
    while sections:
        section = sections.pop()
        sections += section.__subclasses__()
        found |= section.cache_neutral
    # Which runs, seeds and datasets there are does change numbers.
    return (found | _DIVISION) - {"runs", "seeds", "dataset"}


def check_configs(results: Path, reference: Path) -> None:
    """Check that two results folders were made with the same config.

    Raises:
        ComparisonError: they were not; the message lists keys.
    """
    configs = [read_provenance(folder)["config"] for folder in (results, reference)]
    differences = config_differences(*configs)
    if differences:
        more = f"; and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
        raise ComparisonError(
            f"{results} was made with another config than {reference}: {'; '.join(differences[:_SHOWN])}{more}. To compare their "
            "numbers all the same, add --other-config"
        )


def describe(differences: Sequence[Difference]) -> str:
    """The comparison as text: a table, and a sentence on what came out."""
    lines = [("table", "row", "number", "yours", "reference", "difference", "")]
    lines += [
        (*each.place, _text(each.mine), _text(each.reference), _difference(each), _verdict(each))
        for each in differences
        if each.verdict != "new"
    ]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    aligned = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    ]
    return "\n".join([*aligned, "", summarise(differences)])


def _text(number: Number | None) -> str:
    return "-" if number is None else f"{number.value:.3g} [{number.low:.3g}, {number.high:.3g}]"


def _difference(each: Difference) -> str:
    if each.mine is None or each.reference is None:
        return "-"
    low, high = each.interval
    return f"{each.value:+.3g} [{low:+.3g}, {high:+.3g}]"


def _verdict(each: Difference) -> str:
    if each.mine is None or each.reference is None or each.mine.seeds == each.reference.seeds:
        return each.verdict
    seeds = count(each.mine.seeds or 0, "seed")
    return f"{each.verdict} ({seeds}, in the reference {each.reference.seeds})"


def summarise(differences: Sequence[Difference]) -> str:
    """Say how many numbers agree: `Of 40 numbers, 38 agree and 2 differ: of so many, about 2 do by chance. ...`"""
    counts = Counter(each.verdict for each in differences)
    compared = counts["agrees"] + counts["differs"] + counts["far"]
    if not compared:
        return "No number of the two can be compared: they have no table, row and column in common."
    sentences = [f"Of {compared} numbers that both have, {counts['agrees']} agree with the reference."]
    if counts["differs"]:
        sentences.append(f"{counts['differs']} differ, as about {compared / 20:.0f} of so many would by chance.")
    if counts["far"]:
        sentences.append(f"{counts['far']} differ by more than chance explains (far).")
    if counts["missing"]:
        sentences.append(f"{counts['missing']} numbers of the reference are missing here.")
    if counts["new"]:
        sentences.append(f"{counts['new']} numbers here are not in the reference.")
    seeds = [(each.mine.seeds, each.reference.seeds) for each in differences if each.mine and each.reference]
    if single := sum(1 in pair for pair in seeds):
        sentences.append(
            f"{single} {'comes' if single == 1 else 'come'} from one seed, whose interval does not contain how trainings vary: "
            "another seed, or rounding on another machine, may make more of them differ."
        )
    return " ".join(sentences)


def agrees(differences: Sequence[Difference]) -> bool:
    """Whether results reproduce the reference: there is something to compare, nothing is missing, and nothing is far."""
    verdicts = {each.verdict for each in differences}
    return bool(verdicts & {"agrees", "differs"}) and not verdicts & {"far", "missing"}
