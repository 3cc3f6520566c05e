"""Which numbers differ: decided here once, for bold cells, the sentences below tables, and the config's expectations.

Two numbers differ if their 95 % intervals do not touch. A chance level, or a number given in the config, is an interval of
no width. Two runs that the config's expectations compare differ if the interval of their paired difference excludes 0
(`stm.report.pairs`), where their results are kept per test clip.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

Interval = tuple[float, float]


@dataclass(frozen=True)
class Entry:
    """One number of a column, before scaling.

    Attributes:
        interval: its 95 % interval; None: unknown, so that it cannot be told apart from any other number.
        chance: the chance level of its evaluation, if it has one.
        untrained: whether it is the result of a run with 0 epochs.
    """

    name: str
    value: float
    interval: Interval | None
    chance: float | None = None
    untrained: bool = False
    higher_is_better: bool = True


def side(interval: Interval | None, other: Interval | float | None) -> int:
    """Return 1 if an interval lies wholly above the other, -1 if wholly below, 0 if they touch or one is unknown."""
    if interval is None or other is None:
        return 0
    low, high = other if isinstance(other, tuple) else (other, other)
    return int(interval[0] > high) - int(interval[1] < low)


def clear_best(column: Iterable[Entry | None], references: Iterable[Entry] = ()) -> Entry | None:
    """Return the entry of a column that is printed in bold, or None.

    An entry is bold only if it is the best and its 95 % interval lies wholly on the better side of

    - chance, if the evaluation has a chance level,
    - every untrained run (0 epochs), and
    - every other entry of the column.

    Hence an entry without an interval is never bold, nor is any entry beside one without an interval. Untrained runs are
    references and are never bold; neither is an entry without any other to compare with.

    Args:
        column: the entries; None: not measured.
        references: untrained runs that are not part of the column.
    """
    entries = [entry for entry in column if entry is not None] + list(references)
    for entry in entries:
        others = [other for other in entries if other is not entry]
        if others and not entry.untrained and all(_better(entry, other.interval) for other in others):
            return entry if entry.chance is None or _better(entry, entry.chance) else None
    return None


Beats = Callable[[Entry, Interval | float | None], bool]


def _better(entry: Entry, other: Interval | float | None) -> bool:
    return side(entry.interval, other) == (1 if entry.higher_is_better else -1)


def _worse(entry: Entry, other: Interval | float | None) -> bool:
    return side(entry.interval, other) == (-1 if entry.higher_is_better else 1)


def describe_column(entries: Sequence[Entry], noun: str = "run", trained: str = "pretrained runs") -> str:
    """Say which entries of a column differ from chance, from the untrained network and from each other.

    Args:
        entries: the measured entries of the column.
        noun: what an entry is, in the singular.
        trained: what the entries of trained runs are called, in the plural.
    """
    if not entries:
        return "Nothing has been measured."
    known = [entry for entry in entries if entry.interval is not None]
    if not known:
        return f"Without intervals, the {noun}s cannot be compared."
    sentences = []
    if any(entry.chance is not None for entry in known):
        with_level = [entry for entry in known if entry.chance is not None]
        sentences += _describe_sides("chance", noun, with_level, lambda entry, beats: beats(entry, entry.chance))
    untrained = [entry for entry in known if entry.untrained]
    members = [entry for entry in known if not entry.untrained]
    if untrained and members:
        sentences += _describe_sides(
            "the untrained network",
            noun,
            members,
            lambda entry, beats: all(beats(entry, other.interval) for other in untrained),
        )
    sentences += _describe_leader(members, trained)
    if len(known) < len(entries):
        names = [entry.name for entry in entries if entry.interval is None]
        sentences.append(f"Not compared, without an interval: {list_names(names)}.")
    return " ".join(sentences)


def _describe_sides(
    reference: str, noun: str, entries: Sequence[Entry], differs: Callable[[Entry, Beats], bool]
) -> list[str]:
    words = ("Above", "Below") if entries[0].higher_is_better else ("Better than", "Worse than")
    sentences = []
    for word, beats in zip(words, (_better, _worse), strict=True):
        names = [
            f"{entry.name} (untrained)" if entry.untrained else entry.name for entry in entries if differs(entry, beats)
        ]
        sentences += [f"{word} {reference}: {', '.join(names)}."] if names else []
    return sentences or [f"No {noun} differs from {reference}."]


def _describe_leader(entries: Sequence[Entry], plural: str) -> list[str]:
    """Say whether the best entry is better than all others, or from which ones it is not told apart."""
    if len(entries) < 2:
        return []
    if not any(side(one.interval, other.interval) for one in entries for other in entries):
        if len(entries) == 2:
            return [f"{entries[0].name} and {entries[1].name} are not told apart."]
        return [f"The {plural} are not told apart."]
    best = max(entries, key=lambda entry: entry.value if entry.higher_is_better else -entry.value)
    others = [other.name for other in entries if other is not best and not side(best.interval, other.interval)]
    if not others:
        word = "above" if best.higher_is_better else "better than"
        return [f"{best.name} is {word} all other {plural}."]
    return [f"{best.name} is not told apart from {list_names(others)}."]


def beat_reference(entries: Sequence[Entry]) -> tuple[str, list[str]]:
    """Return the reference of a column, and the trained entries that are better with intervals apart.

    The reference is the untrained network, else chance; empty if the column has neither, or no trained entry.
    """
    trained = [entry for entry in entries if not entry.untrained]
    untrained = [entry for entry in entries if entry.untrained]
    if trained and untrained:
        names = [entry.name for entry in trained if all(_better(entry, other.interval) for other in untrained)]
        return "the untrained network", names
    if any(entry.chance is not None for entry in trained):
        return "chance", [entry.name for entry in trained if _better(entry, entry.chance)]
    return "", []


def list_names(names: Sequence[str]) -> str:
    """Join names as in `a, b and c`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
