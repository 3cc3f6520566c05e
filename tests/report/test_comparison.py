"""The rule that decides which numbers differ, on made-up intervals, and the sentences that follow from it."""

import pytest

from stm.report.comparison import Entry, beat_reference, clear_best, describe_column, side
from stm.report.results.records import MetricValue, over_seeds


def entry(name: str, low: float, high: float, **more) -> Entry:
    return Entry(name, (low + high) / 2, (low, high), **more)


def unknown(name: str, value: float, **more) -> Entry:
    return Entry(name, value, None, **more)


@pytest.mark.parametrize(
    ("interval", "other", "expected"),
    [
        ((3, 4), (1, 2), 1),
        ((1, 2), (3, 4), -1),
        ((1, 3), (2, 4), 0),
        ((1, 2), (2, 3), 0),  # touching
        ((1, 4), (2, 3), 0),
        ((1, 2), 0.9, 1),
        ((1, 2), 2.1, -1),
        ((1, 2), 1.5, 0),
        (None, (1, 2), 0),
        ((1, 2), None, 0),
    ],
)
def test_intervals_that_touch_or_are_unknown_are_not_apart(interval, other, expected) -> None:
    assert side(interval, other) == expected


@pytest.mark.parametrize(
    ("column", "references", "best"),
    [
        ([entry("a", 5, 6), entry("b", 7, 8)], [], "b"),
        ([entry("a", 5, 7), entry("b", 7, 8)], [], None),
        ([entry("a", 5, 6, chance=1), entry("b", 7, 8, chance=7.5)], [], None),
        ([entry("a", 1, 2, chance=5), entry("b", 3, 4, chance=5)], [], None),  # the best of those below chance
        ([entry("a", 5, 6), entry("b", 7, 8)], [entry("random weights", 6, 7.5)], None),
        ([entry("a", 5, 6), entry("b", 7, 8)], [entry("random weights", 1, 2)], "b"),
        ([entry("a", 5, 6), entry("b", 7, 8, untrained=True)], [], None),
        ([entry("a", 5, 6), unknown("b", 9)], [], None),
        ([unknown("a", 1), unknown("b", 9)], [], None),
        ([entry("a", 5, 6), None], [], None),  # nothing to compare with
        ([None, None], [], None),
        ([entry("a", 1, 2, higher_is_better=False), entry("b", 3, 4, higher_is_better=False)], [], "a"),
    ],
)
def test_bold_is_only_what_is_apart_from_everything(column, references, best) -> None:
    found = clear_best(column, references)
    assert (found and found.name) == best


@pytest.mark.parametrize(
    ("column", "sentence"),
    [
        ([], "Nothing has been measured."),
        ([unknown("a", 1), unknown("b", 2)], "Without intervals, the runs cannot be compared."),
        (
            [entry("a", 1, 4, chance=3), entry("b", 2, 5, chance=3), entry("c", 2, 6, chance=3)],
            "No run differs from chance. The pretrained runs are not told apart.",
        ),
        (
            [entry("a", 5, 6, chance=3), entry("b", 7, 8, chance=3), entry("w", 1, 2, chance=3, untrained=True)],
            "Above chance: a, b. Below chance: w (untrained). Above the untrained network: a, b. "
            "b is above all other pretrained runs.",
        ),
        (
            [entry("a", 5, 6), entry("b", 5.5, 8), entry("c", 1, 2), entry("w", 1.5, 2, untrained=True)],
            "Above the untrained network: a, b. b is not told apart from a.",
        ),
        (
            [entry("a", 1, 2), entry("w", 3, 4, untrained=True), unknown("c", 3)],
            "Below the untrained network: a. Not compared, without an interval: c.",
        ),
    ],
)
def test_sentences_name_exactly_what_differs(column, sentence) -> None:
    assert describe_column(column) == sentence


def test_the_reference_is_the_untrained_network_and_else_chance() -> None:
    runs = [entry("a", 5, 6, chance=1), entry("b", 2, 4, chance=1)]
    assert beat_reference([*runs, entry("w", 3, 4, untrained=True)]) == ("the untrained network", ["a"])
    assert beat_reference(runs) == ("chance", ["a", "b"])
    assert beat_reference([entry("a", 5, 6)]) == ("", [])


def values(*numbers: float, spread: float | None = None) -> list[MetricValue]:
    return [MetricValue("x", n, None if spread is None else (n - spread, n + spread), None) for n in numbers]


def test_one_seed_has_the_interval_of_its_evaluation() -> None:
    assert over_seeds(values(0.5, spread=0.1)).interval == (0.4, 0.6)
    assert over_seeds(values(0.5)).interval is None


def test_three_seeds_have_the_t_interval_of_their_mean() -> None:
    """By hand: mean 0.5, deviation 0.1, the 97.5 % quantile for 2 degrees of freedom 4.303: 4.303 * 0.1 / sqrt(3) = 0.2484."""
    assert over_seeds(values(0.4, 0.5, 0.6)).interval == pytest.approx((0.2516, 0.7484), abs=1e-4)


def test_seeds_that_agree_have_the_interval_of_their_test_clips() -> None:
    """Equal seeds must not look certain: they are evaluated on the same few clips."""
    assert over_seeds(values(0.5, 0.5, 0.5, spread=0.1)).interval == pytest.approx((0.4, 0.6))
