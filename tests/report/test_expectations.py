"""The config's expectations: names are checked, and outcomes follow from the intervals."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from report_results import RUN, copy_results, make_config, make_headline

from stm.config import Config, ConfigError
from stm.config.report import MaskGuide
from stm.evaluation.masks.box_coverage import GUIDES
from stm.layout import Layout
from stm.report.expectations import count_outcomes, expectations_table
from stm.report.names import table_names
from stm.report.results.collect import collect_study
from stm.report.tables import Table
from stm.storage.files import write_json
from stm.storage.tables import write_table


def expect(config: Config, *expected: dict[str, Any]) -> Table:
    entries = [{"says": "so it is", **one} for one in expected]
    changed = make_config(Path(config.results), report={"expect": entries})
    study = collect_study(changed, Layout.of(changed))
    return expectations_table(study, study.groups)


SCORE = {"run": "text", "evaluation": "finetune"}  # 0.6, interval 0.4 to 0.8; tube 0.5, 0.3 to 0.7; chance 0.25
MASK = {"guide": "text_top", "camera": "moving"}


@pytest.mark.parametrize(
    ("expected", "outcome"),
    [
        ({**SCORE, "above": "chance"}, "held"),
        ({**SCORE, "below": "chance"}, "did not hold"),
        ({**SCORE, "above": "tube"}, "not told apart"),
        ({**SCORE, "above": "scratch"}, "not told apart"),
        ({**SCORE, "above": 0.3}, "held"),
        ({**SCORE, "above": 0.5}, "not told apart"),
        ({**SCORE, "below": 0.9}, "held"),
        ({**SCORE, "above": 0.9}, "did not hold"),
    ],
)
def test_a_score_is_compared_by_its_interval(made_results: Config, expected: dict[str, Any], outcome: str) -> None:
    (row,) = expect(made_results, expected).rows
    assert row[1].text == outcome
    assert (row[0].text, row[-1].text) == ("so it is", "text: Fine-tuning, top-1 %")
    assert (row[2].text, row[2].note) == ("60.0", "[40.0, 80.0]")


def test_bounds_are_shown_with_their_intervals(made_results: Config) -> None:
    table = expect(made_results, {**SCORE, "above": "tube"}, {**SCORE, "above": "chance"}, {**SCORE, "below": 0.9})
    assert [(row[3].text, row[3].note) for row in table.rows] == [
        ("above tube 50.0", "[30.0, 70.0]"),
        ("above chance 25.0", ""),
        ("below 90.0", ""),
    ]
    assert count_outcomes(table) == "Of 3 expectations, 2 held, 1 is not told apart."


def test_another_metric_than_the_headline_can_be_expected(made_results: Config) -> None:
    """As in a table's column; one that the evaluation lacks is a problem that the page lists."""
    (row,) = expect(made_results, {**SCORE, "metric": "top5", "above": 0.9}).rows
    assert (row[2].text, row[-1].text) == ("100.0", "text: Fine-tuning, top-5 %")
    entries = [{"says": "x", **SCORE, "metric": "top9", "above": "tube"}]
    config = make_config(Path(made_results.results), report={"expect": entries})
    study = collect_study(config, Layout.of(config))
    (row,) = expectations_table(study, study.groups).rows
    assert row[1].text == "not measured" and len(study.own.problems) == 2 and "has no top9" in study.own.problems[0]


def write_answers(config: Config, instance: str, correct: np.ndarray, first_clip: int = 0) -> None:
    """The predictions of fine-tuning: whether each clip is classified correctly."""
    clips = range(first_clip, first_clip + len(correct))
    rows = {"key": [f"clip-{n:03d}" for n in clips], "label": ["up"] * len(correct)}
    table = pa.table({**rows, "prediction": np.where(correct, "up", "down").tolist()})
    write_table(Layout.of(config).evaluate(instance, "finetune") / "predictions.parquet", table, {})


def answers(first_alone: int, second_alone: int, both: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Whether two runs are right about 100 clips."""
    place = np.arange(100)
    shared = place >= 100 - both
    return (place < first_alone) | shared, ((place >= first_alone) & (place < first_alone + second_alone)) | shared


@pytest.mark.parametrize(
    ("first_alone", "second_alone", "outcome"),
    [(20, 5, "held"), (5, 20, "did not hold"), (15, 10, "not told apart"), (0, 0, "not told apart")],
)
def test_runs_are_compared_by_the_difference_on_the_same_clips(
    made_results: Config, tmp_path: Path, first_alone: int, second_alone: int, outcome: str
) -> None:
    """Though the intervals of the two numbers touch: McNemar's pairs in closed form."""
    config = copy_results(made_results, tmp_path / "copy")
    for run, correct in zip(("text", "tube"), answers(first_alone, second_alone), strict=True):
        write_answers(config, run, correct)
    table = expect(config, {**SCORE, "above": "tube"}, {"run": "tube", "evaluation": "finetune", "below": "text"})
    assert [row[1].text for row in table.rows] == [outcome] * 2
    value = (first_alone - second_alone) / 100
    half = 2.042 * np.sqrt(((first_alone + second_alone) / 100 - value**2) / 99)
    if first_alone == second_alone == 0:  # the exact binomial bound of a share of which none of 100 was seen
        half = 1 - 0.025 ** (1 / 100)
    first, second = csv.DictReader(table.to_csv().splitlines())
    for row, sign in ((first, 1), (second, -1)):
        found = [float(row[key]) for key in ("difference", "difference_low", "difference_high")]
        assert found == pytest.approx([sign * value, sign * value - half, sign * value + half], abs=1e-6)
        assert (row["decided_by"], row["value"]) == ("pairs", "0.6" if sign > 0 else "0.5")
    cell = table.rows[0][4]
    bounds = f"[{100 * (value - half):.1f}, {100 * (value + half):.1f}]"
    assert (cell.text, cell.note) == (f"{100 * value:+.1f}", f"{bounds} paired, 1 seed")


def test_runs_without_pairs_are_compared_by_their_intervals_and_the_page_says_why(
    made_results: Config, tmp_path: Path
) -> None:
    config = copy_results(made_results, tmp_path / "copy")
    changed = make_config(Path(config.results), report={"expect": [{"says": "x", **SCORE, "above": "tube"}]})
    file = Layout.of(config).evaluate("tube", "finetune") / "predictions.parquet"

    def decide() -> tuple[str, str, str, list[str]]:
        study = collect_study(changed, Layout.of(changed))
        (row,) = expectations_table(study, study.groups).rows
        return row[1].text, row[4].note, str(row[4].values[-1]), study.own.problems

    assert decide() == ("not told apart", "not paired: no results per clip", "intervals", [])
    first, second = answers(30, 5)
    write_answers(config, "text", first)
    assert decide() == ("not told apart", "not paired: no results per clip", "intervals", [])
    write_answers(config, "tube", second, first_clip=1)
    assert decide() == ("not told apart", "not paired: other test clips", "intervals", [])
    file.write_bytes(file.read_bytes()[:-9])
    *decided, problems = decide()
    assert decided == ["not told apart", "not paired: results per clip unreadable", "intervals"]
    assert len(problems) == 1 and str(file) in problems[0]
    write_answers(config, "tube", second)
    # 0.25 and 2.042 sqrt((0.35 - 0.25²) / 99) to both sides
    assert decide() == ("held", "[14.0, 36.0] paired, 1 seed", "pairs", [])


def test_only_common_seeds_are_paired_and_of_several_two_at_least(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    seeds = {"tube": [0, 1, 2], "text": [1, 2, 3], "scratch": [3, 4]}
    runs = {name: {**RUN, "mask": {"strategy": "tube", "ratio": 0.75}, "seeds": own} for name, own in seeds.items()}
    expected = [{"says": "x", **SCORE, "above": name} for name in ("tube", "scratch", "chance")]
    config = make_config(tmp_path, pretrain=runs, report={"expect": expected})
    right = {}
    for name, own in seeds.items():
        for seed in own:
            right[name, seed] = rng.random(150) < (0.8 if name == "text" else 0.2)
            write_answers(config, f"{name}-seed{seed}", right[name, seed])
            headline = make_headline("top1", "top-1", float(right[name, seed].mean()), None, 0.25)
            write_json(Layout.of(config).metrics(f"{name}-seed{seed}", "finetune"), {"headline": headline})
    study = collect_study(config, Layout.of(config))
    paired, unpaired, chance = expectations_table(study, study.groups).rows
    difference = np.mean([right["text", seed].mean() - right["tube", seed].mean() for seed in (1, 2)])
    assert paired[4].values[0] == pytest.approx(difference) and paired[4].note.endswith("paired, 2 seeds")
    assert paired[2].values[0] == pytest.approx(np.mean([right["text", seed].mean() for seed in (1, 2, 3)]))
    assert (unpaired[4].note, unpaired[4].values[-1]) == ("not paired: 1 common seed", "intervals")
    assert (chance[4].note, chance[4].values[-1]) == ("", "intervals")


@pytest.fixture
def measured_masks(made_results: Config, tmp_path: Path) -> Config:
    """Results whose mask quality names the guides as the stage does."""
    config = copy_results(made_results, tmp_path / "copy")
    path = Layout.of(config).mask_quality
    path.write_text(path.read_text().replace('"text"', '"text_top"'))
    return config


@pytest.mark.parametrize(
    ("expected", "outcome"),
    [
        ({**MASK, "above": 0.85}, "held"),  # 0.92, interval 0.87 to 0.96
        ({**MASK, "above": 0.95}, "not told apart"),
        ({**MASK, "above": "chance"}, "held"),
        ({**MASK, "above": "motion"}, "held"),  # 0.61, interval 0.56 to 0.65
        ({**MASK, "camera": "fixed", "above": "motion"}, "not told apart"),
        ({"guide": "motion", "camera": "moving", "ratio": 0.6, "above": "text_top"}, "did not hold"),
        ({"guide": "motion", "camera": "moving", "above": 0.5}, "not measured"),  # at its own ratio, 0.75
        ({**MASK, "above": "random"}, "not measured"),
        ({**MASK, "source": "label", "above": 0.5}, "not measured"),
    ],
)
def test_masks_are_compared_at_the_same_ratio_and_camera(
    measured_masks: Config, expected: dict[str, Any], outcome: str
) -> None:
    (row,) = expect(measured_masks, expected).rows
    assert row[1].text == outcome


def test_without_results_nothing_is_claimed(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    table = expect(config, {**SCORE, "above": "chance"}, {**SCORE, "above": "tube"}, {**MASK, "above": 0.5})
    assert [row[1].text for row in table.rows] == ["not measured"] * 3
    assert {row[2].text for row in table.rows} == {"\u2013"}


def test_csv_has_the_numbers_unscaled(made_results: Config) -> None:
    (row,) = csv.DictReader(expect(made_results, {**SCORE, "above": "tube"}).to_csv().splitlines())
    assert [row[key] for key in ("value", "low", "high", "direction", "bound", "bound_low", "outcome")] == [
        *("0.6", "0.4", "0.8", "above", "tube", "0.3", "not told apart")
    ]
    config = make_config(Path(made_results.results), report={"expect": [{"says": "x", **SCORE, "above": "tube"}]})
    assert "expectations.csv" in table_names(config) and "expectations.csv" not in table_names(made_results)


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        ({**SCORE}, "give either `above` or `below`"),
        ({**SCORE, "above": 0.1, "below": 0.2}, "give either `above` or `below`"),
        ({**SCORE, "run": "tubes", "above": 0.1}, "names the run 'tubes'; evaluate.finetune includes: tube, text, scratch"),
        ({**SCORE, "above": "tubes"}, "names the run 'tubes'; .* and `chance` is its chance level"),
        ({**SCORE, "evaluation": "probe", "above": 0.1}, "names the evaluation 'probe'; evaluate has: linear, finetune"),
        ({"run": "text", "above": 0.1}, "report.expect.0.evaluation: this key is required"),
        ({**SCORE, "higher": 0.1}, "no such key"),
        ({**MASK, "guide": "text", "above": 0.1}, "guide = 'text'"),
        ({**MASK, "source": "blip2", "above": 0.1}, "source is 'blip2'; captions has: human, label"),
        ({**MASK, "ratio": 0.5, "above": 0.1}, "ratio is 0.5; mask quality is measured at 0.6 and 0.75"),
        ({**MASK, "dataset": "other", "above": 0.1}, "dataset is 'other'; mask quality is measured on: made"),
    ],
)  # fmt: skip
def test_expectations_that_cannot_be_checked_are_refused(
    expected: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(tmp_path, report={"expect": [{"says": "x", **expected}]})


def test_masks_are_only_expected_where_they_are_measured(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no section mask_quality"):
        make_config(tmp_path, mask_quality=None, report={"expect": [{"says": "x", **MASK, "above": 0.5}]})


def test_guides_are_those_that_the_stage_measures() -> None:
    assert set(MaskGuide.__args__) == set(GUIDES)  # type: ignore[attr-defined]
