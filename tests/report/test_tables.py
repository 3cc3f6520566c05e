"""Tables: CSV, Markdown and the page agree, and missing numbers stay empty."""

import csv
import dataclasses
import io
import math

import pytest

from stm.config import Config
from stm.layout import Layout
from stm.report.names import figure_names, table_names
from stm.report.page.sentences import chances
from stm.report.results.collect import collect
from stm.report.results.records import (
    Evaluation,
    MaskQualityRow,
    MetricValue,
    Refusal,
    Results,
    RunGroup,
    group_runs,
)
from stm.report.tables import (
    Table,
    count,
    estimate,
    mask_quality_table,
    number,
    per_class_table,
    percent,
    quarantine_table,
    results_table,
    text_cell,
)


@pytest.fixture(scope="module")
def results(made_results: Config) -> Results:
    return collect(made_results, Layout.of(made_results))


def read_csv(table: Table) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(table.to_csv())))


def test_csv_rows_have_a_value_for_every_key(made_results: Config, results: Results) -> None:
    groups = group_runs(made_results, results.runs)
    for table in (
        results_table(made_results, groups, chances(groups)),
        per_class_table(made_results, groups),
        mask_quality_table(results.mask_quality),
        quarantine_table(results.refusals),
    ):
        lines = list(csv.reader(io.StringIO(table.to_csv())))
        assert {len(line) for line in lines} == {len(table.keys)}
        assert {len(row) for row in table.rows + table.footer} == {len(table.columns)}


def test_results_are_those_of_the_files(made_results: Config, results: Results) -> None:
    groups = group_runs(made_results, results.runs)
    rows = {row["run"]: row for row in read_csv(results_table(made_results, groups, chances(groups)))}
    assert rows["text"]["mask"] == "text_top"
    assert float(rows["text"]["linear_top1"]) == pytest.approx(0.6)
    assert float(rows["text"]["linear_low"]) == pytest.approx(0.4)
    assert rows["scratch"]["final_loss"] == ""
    assert float(rows["chance"]["finetune_top1"]) == 0.25


def with_scores(config: Config, results: Results, scores: dict[str, tuple[float, float] | None]) -> list[RunGroup]:
    """The runs with these intervals of every evaluation; the value is the middle, and chance 0.25."""
    runs = []
    for run in results.runs:
        interval = scores[run.name]
        value = 0.5 if interval is None else sum(interval) / 2
        headline = MetricValue("top-1", value, interval, 0.25)
        runs.append(dataclasses.replace(run, evaluations=dict.fromkeys(config.evaluate, Evaluation(headline, {}))))
    return group_runs(config, runs)


@pytest.mark.parametrize(
    ("tube", "text", "scratch", "bold"),
    [
        ((0.50, 0.60), (0.70, 0.80), (0.30, 0.40), ["text"]),
        ((0.50, 0.72), (0.70, 0.80), (0.30, 0.40), []),  # overlaps the other run
        ((0.50, 0.60), (0.70, 0.80), (0.65, 0.71), []),  # overlaps the untrained run
        ((0.05, 0.10), (0.20, 0.30), (0.05, 0.15), []),  # overlaps chance, 0.25
        ((0.50, 0.60), None, (0.30, 0.40), []),  # no interval: not told apart
        ((0.30, 0.40), (0.50, 0.60), (0.70, 0.80), []),  # the untrained run is the best
        ((0.70, 0.80), (0.70, 0.80), (0.30, 0.40), []),  # a tie
    ],
)
def test_only_a_number_apart_from_chance_untrained_and_all_others_is_bold(
    made_results: Config, results: Results, tube, text, scratch, bold
) -> None:
    groups = with_scores(made_results, results, {"tube": tube, "text": text, "scratch": scratch})
    table = results_table(made_results, groups, chances(groups))
    for column in (5, 6):
        assert [row[0].text for row in table.rows if row[column].bold] == bold
    assert table.to_markdown().count("**") == 4 * len(bold)


def test_sentences_below_the_results_say_which_runs_differ(made_results: Config, results: Results) -> None:
    groups = with_scores(made_results, results, {"tube": (0.5, 0.6), "text": (0.55, 0.65), "scratch": (0.3, 0.4)})
    table = results_table(made_results, groups, chances(groups))
    sentence = "Above chance: tube, text, scratch (untrained). Above the untrained network: tube, text. "
    sentence += "tube and text are not told apart."
    assert table.outcomes == [("Linear probe", sentence), ("Fine-tuning", sentence)]
    assert "- Linear probe: Above chance: tube" in table.to_markdown()


def test_masks_compete_only_with_masks_of_their_ratio() -> None:
    rows = [
        MaskQualityRow("text", "human", "moving", 0.6, 0.92, (0.90, 0.94), 3, 0.6),
        MaskQualityRow("motion", "", "moving", 0.6, 0.61, (0.58, 0.64), 3, 0.6),
        MaskQualityRow("motion", "", "moving", 0.75, 0.97, (0.96, 0.98), 3, 0.75),
        MaskQualityRow("random", "", "moving", 0.75, 0.75, (0.74, 0.76), 3, 0.75),
    ]
    table = mask_quality_table(rows)
    assert [(row[0].text, row[2].text) for row in table.rows if row[-1].bold] == [("text", "0.60"), ("motion", "0.75")]
    assert table.outcomes[0] == (
        "Moving camera, ratio 0.6",
        "Above chance: text (human). text (human) is above all other masks.",
    )


@pytest.mark.parametrize("interval", [(0.88, 0.95), None])
def test_a_mask_that_overlaps_another_is_not_bold(interval: tuple[float, float] | None) -> None:
    rows = [
        MaskQualityRow("text", "human", "fixed", 0.6, 0.90, (0.89, 0.91), 9, 0.6),
        MaskQualityRow("motion", "", "fixed", 0.6, 0.94, interval, 9, 0.6),
    ]
    assert not any(row[-1].bold for row in mask_quality_table(rows).rows)


def test_a_run_without_evaluation_has_dashes_not_zeros(made_results: Config, results: Results) -> None:
    bare = [run.__class__(**{**run.__dict__, "evaluations": {}}) for run in results.runs]
    table = results_table(made_results, group_runs(made_results, bare), {})
    assert table.footer == []
    assert all(cell.text == "\u2013" for row in table.rows for cell in row[5:])


def test_classes_without_test_clips_are_empty(made_results: Config, results: Results) -> None:
    rows = read_csv(per_class_table(made_results, group_runs(made_results, results.runs)))
    assert {(row["class"], row["tube"]) for row in rows} == {("slides right", "0.666667"), ("spins", "")}


def test_cells_of_a_camera_without_clips_are_empty() -> None:
    rows = [
        MaskQualityRow("text", "a", "fixed", 0.6, 0.9, (0.8, 1.0), 4, 0.6),
        MaskQualityRow("motion", "", "moving", 0.75, 0.7, (0.6, 0.8), 4, 0.75),
    ]
    first, second = read_csv(mask_quality_table(rows))
    assert (first["fixed_coverage"], first["moving_coverage"], second["fixed_clips"]) == ("0.9", "", "")


def test_markdown_cells_are_escaped() -> None:
    refusal = Refusal("frames", "a|b", "x\ny.mp4", "timeout", "drop", "<script>*boo*</script> [x](y) `z` \\")
    lines = quarantine_table([refusal]).to_markdown().splitlines()
    assert len(lines) == 3
    unescaped = lines[2].replace("\\\\", "").replace("\\|", "")
    assert unescaped.count("|") == 8
    assert "\\<script\\>\\*boo\\*" in lines[2]


@pytest.mark.parametrize(
    "make", [lambda: percent(None), lambda: percent(math.nan), lambda: number(None, 2), lambda: count(None)]
)
def test_missing_numbers_are_shown_as_a_dash_and_empty_in_csv(make) -> None:
    cell = make()
    assert (cell.text, cell.values) == ("\u2013", (None,))


def test_cells_format_their_values() -> None:
    assert percent(0.12345).text == "12.3"
    assert estimate(0.5, (0.4, 0.6)).note == "[40.0, 60.0]"
    assert estimate(0.5, None).values == (0.5, None, None)
    assert count(1234567).text == "1\u2009234\u2009567"
    assert text_cell("").text == "\u2013"


def test_file_names_follow_from_the_config_alone(made_results: Config) -> None:
    assert figure_names(made_results) == [
        "loss_curves.png",
        "mask_quality.png",
        "clip_1.png",
        "clip_2.png",
        "masks.png",
    ]
    assert {name.split(".")[0] for name in table_names(made_results)} == {
        "results",
        "per_class",
        "mask_quality",
        "quarantine",
    }
    bare = made_results.model_copy(update={"pretrain": {}, "mask_quality": None})
    assert figure_names(bare) == ["clip_1.png", "clip_2.png", "masks.png"]
    assert table_names(bare) == ["quarantine.csv", "quarantine.md"]
