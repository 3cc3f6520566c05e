"""Several seeds, contrast and retrieval: tables and charts over seeds, and the config's own tables and figures."""

import csv
import io
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from report_results import build_copy, check_report_files, copy_results, make_config
from report_study import make_study, make_study_config

from stm.config import Config, ConfigError
from stm.layout import Layout
from stm.report import figures, write_figure, write_table
from stm.report.names import table_names, untrained_runs
from stm.report.page import sentences
from stm.report.page.context import MAX_EVALUATIONS, split_results
from stm.report.page.own_tables import show_figures, show_tables
from stm.report.paper.figures import read_curve
from stm.report.paper.tables import paper_table, table_note
from stm.report.paper.write import draw_figure
from stm.report.results.collect import collect_study
from stm.report.results.evaluations import ReportError, read_measurement
from stm.report.results.records import Evaluation, Measurement, Run, RunGroup, Study
from stm.report.tables import measurement_cell, per_class_table, results_table
from stm.storage.files import write_json


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Read-only."""
    return make_study(tmp_path_factory.mktemp("study"))


@pytest.fixture
def copied(config: Config, tmp_path: Path) -> Config:
    """A copy that a test may damage."""
    return copy_results(config, tmp_path / "copy")


@pytest.fixture(scope="module")
def study(config: Config) -> Study:
    return collect_study(config, Layout.of(config))


def read_csv(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


# ---------------------------------------------------------------------------------------------- over seeds


def test_every_seed_is_read_and_belongs_to_its_run(study: Study) -> None:
    groups = {group.name: [run.name for run in group.instances] for group in study.groups}
    assert groups["text"] == ["text-seed0", "text-seed1", "text-seed2"]
    assert list(groups) == ["tube", "text", "attentive", "scratch"]
    assert set(study.groups[0].instances[0].evaluations) == {"linear"}  # the other evaluations leave tube out


def test_results_have_one_row_per_run_with_mean_and_deviation(config: Config, study: Study) -> None:
    """By hand: the mean of 0.4, 0.5, 0.6 is 0.5; squared distances sum to 0.02, over n - 1 = 2 is 0.1 squared."""
    table = results_table(config, study.groups, sentences.chances(study.groups))
    rows = {row["run"]: row for row in read_csv(table.to_csv())}
    assert list(rows) == ["tube", "text", "attentive", "scratch", "chance"]
    assert float(rows["tube"]["linear_top1"]) == pytest.approx(0.5)
    assert float(rows["tube"]["linear_deviation"]) == pytest.approx(0.1)
    # Student's t for 3 seeds: 4.303 * 0.1 / sqrt(3) = 0.2484.
    assert rows["tube"]["linear_seeds"] == "3"
    assert float(rows["tube"]["linear_low"]) == pytest.approx(0.5 - 0.2484, abs=1e-4)
    # 4.303 * 0.02 / sqrt(3) = 0.05 is less than the 0.1 of each seed's own interval.
    assert float(rows["text"]["linear_high"]) == pytest.approx(0.9)
    assert [row[5].text for row in table.rows] == ["50.0 ± 10.0", "80.0 ± 2.0", "30.0 ± 0.0", "20.0 ± 10.0"]
    # text, 70 to 90, is apart from attentive, 20 to 40, but not from tube, 25 to 75.
    assert not any(row[5].bold for row in table.rows)
    assert "text is not told apart from tube." in table.outcomes[0][1]


def test_retrieval_is_shown_as_recall_and_a_run_without_it_as_a_dash(config: Config, study: Study) -> None:
    table = results_table(config, study.groups, sentences.chances(study.groups))
    assert table.columns[5:] == ["Linear probe, top-1 %", "Zero-shot, top-1 %", "Retrieval, text-to-video R@1 %"]
    assert [row[7].text for row in table.rows] == ["\u2013", "40.0 ± 1.0", "15.0 ± 0.0", "\u2013"]
    assert [row[6].text for row in table.rows] == ["\u2013", "80.0 ± 2.0", "\u2013", "\u2013"]
    chance = read_csv(table.to_csv())[-1]
    assert float(chance["retrieval_r1"]) == 1 / 8 and float(chance["linear_top1"]) == 1 / 4


def test_a_missing_seed_is_noted(copied: Config) -> None:
    (Layout.of(copied).evaluate("tube-seed2", "linear") / "metrics.json").unlink()
    (Layout.of(copied).evaluate("scratch-seed1", "linear") / "metrics.json").unlink()
    (Layout.of(copied).evaluate("scratch-seed2", "linear") / "metrics.json").unlink()
    groups = collect_study(copied, Layout.of(copied)).groups
    tube, _, _, scratch = (row[5] for row in results_table(copied, groups, {}).rows)
    # 12.706 * 0.0707 / sqrt(2) = 0.635
    assert (tube.text, tube.note) == ("45.0 ± 7.1", "[-18.5, 108.5] 2 of 3 seeds")
    assert (scratch.text, scratch.note) == ("10.0", "[0.0, 20.0] 1 of 3 seeds")


def test_classes_are_averaged_over_seeds_and_retrieval_has_none(config: Config, study: Study) -> None:
    rows = read_csv(per_class_table(config, study.groups).to_csv())
    assert {(row["evaluation"], row["class"]) for row in rows} == {
        (task, label) for task in ("linear", "zero_shot") for label in ("slides right", "spins")
    }
    assert float(rows[0]["tube"]) == pytest.approx(0.5) and rows[1]["tube"] == ""


def without_chance(evaluation: Evaluation) -> Evaluation:
    return replace(evaluation, headline=replace(evaluation.headline, chance=None))


def test_evaluations_without_a_chance_level_have_no_row_of_chance(config: Config, study: Study) -> None:
    """Captioning, for example."""
    [dataset] = study.datasets
    runs = [
        replace(run, evaluations={task: without_chance(evaluation) for task, evaluation in run.evaluations.items()})
        for run in dataset.results.runs
    ]
    unknown = replace(study, datasets=[replace(dataset, results=replace(dataset.results, runs=runs))])
    table = results_table(config, unknown.groups, sentences.chances(unknown.groups))
    assert [row[5].text for row in table.rows] == ["50.0 ± 10.0", "80.0 ± 2.0", "30.0 ± 0.0", "20.0 ± 10.0"]
    text = table.to_csv() + table.to_markdown()
    assert table.footer == [] and "hance" not in text and "nan" not in text


def test_curves_are_averaged_where_all_seeds_have_logged(config: Config) -> None:
    run = config.runs["tube-seed0"]
    runs = [Run("a", run, [1, 2, 3], [1.0, 2.0, 3.0], None, {}), Run("b", run, [2, 3, 4], [4.0, 5.0, 6.0], None, {})]
    assert figures.mean_curves([(run.steps, run.losses) for run in runs]) == ([2, 3], [[2.0, 3.0], [4.0, 5.0]])
    drawn = figures.loss_curves([RunGroup("tube", 0, runs)]).axes[0]
    assert drawn.lines[0].get_ydata().tolist() == [3.0, 4.0]
    band = drawn.collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == (2.0, 5.0)


def test_the_legend_of_many_curves_is_beside_them(config: Config) -> None:
    groups = [
        RunGroup(f"run{i}", i, [Run(f"run{i}", config.runs["tube-seed0"], [1, 2], [1.0, 0.5], None, {})])
        for i in range(30)
    ]
    figure = figures.loss_curves(groups)
    figures.to_png(figure)
    axes = figure.axes[0]
    assert len(axes.lines) == 30  # no single values behind them
    (legend,) = figure.legends
    assert legend.get_window_extent().x0 >= axes.get_window_extent().x1
    assert legend.get_window_extent().y0 >= 0


def test_many_evaluations_are_split_by_the_runs_that_have_them(tmp_path: Path) -> None:
    tasks = {f"linear{i}": {"task": "linear", "runs": ["tube"] if i % 2 else ["tube", "text"]} for i in range(6)}
    assert len(tasks) > MAX_EVALUATIONS
    config = make_study_config(tmp_path, evaluate=tasks, tables={}, figures={}, seeds=[])
    groups = [
        RunGroup(name, i, [Run(name, run, [], [], None, {})]) for i, (name, run) in enumerate(config.runs.items())
    ]
    parts = [(part["table"].rows, part["table"].columns[5:]) for part in split_results(config, groups)]
    assert [[row[0].text for row in rows] for rows, _ in parts] == [
        ["tube", "text"],
        ["tube"],
        ["attentive", "scratch"],
    ]
    assert [len(columns) for _, columns in parts] == [3, 3, 0]


def test_a_measurement_shows_deviation_or_interval() -> None:
    assert measurement_cell(None).text == "\u2013"
    assert measurement_cell(Measurement([0.5], (0.4, 0.6))).note == "[40.0, 60.0]"
    assert measurement_cell(Measurement([3.0, 5.0], None, scale=1)).text == "4.0 ± 1.4"
    assert measurement_cell(Measurement([3.0, 5.0], (1.0, 7.0), scale=1)).note == "[1.0, 7.0]"


# -------------------------------------------------------------------------------- the config's tables, figures


def test_the_table_agrees_with_a_computation_by_hand(config: Config) -> None:
    tube, text = read_csv(paper_table(config, "main").to_csv())
    assert float(tube["linear_mean"]) == pytest.approx(0.5) and float(tube["linear_deviation"]) == pytest.approx(0.1)
    assert (tube["linear_seeds"], tube["linear_paper"]) == ("3", "66.6")
    assert tube["text_to_video_r_1_mean"] == tube["text_to_video_r_1_paper"] == ""
    # Half of 0.78, 0.80, 0.82; ten times these are the ranks.
    assert float(text["text_to_video_r_1_mean"]) == pytest.approx(0.4)
    assert float(text["text_to_video_r_1_deviation"]) == pytest.approx(0.01)
    assert float(text["median_rank_mean"]) == pytest.approx(8.0)
    assert text["text_to_video_r_1_paper"] == "12"
    # The row's own certainty where it has one, else the table's, and none without a number.
    assert [row["linear_paper_certainty"] for row in (tube, text)] == ["second_hand", "source"]
    assert [row["text_to_video_r_1_paper_certainty"] for row in (tube, text)] == ["", "second_hand"]


def test_shares_are_percentages_and_ranks_are_not(config: Config) -> None:
    cells = paper_table(config, "main").rows[1]
    assert [cell.text for cell in cells] == ["Text", "80.0 ± 2.0", "67.5", "40.0 ± 1.0", "12.0", "8.0 ± 0.2"]
    assert not any(cell.bold for cell in cells)  # tube's interval, 25 to 75, touches text's


@pytest.mark.parametrize(("scores_of_text", "bold"), [((0.9, 1.5, 1.8), False), ((1.5, 1.6, 1.4), True)])
def test_scores_above_one_are_scaled_by_a_hundred(copied: Config, scores_of_text: Sequence[float], bold: bool) -> None:
    """CIDEr has no interval of its own: that over 3 seeds is 4.303 deviations / sqrt(3), 24.8 for the second run."""
    for run, scores in {"text": scores_of_text, "tube": (0.8, 0.9, 0.7), "scratch": (0.2, 0.3, 0.2)}.items():
        for instance, score in zip(copied.instances(run), scores, strict=True):
            path = Layout.of(copied).evaluate(instance, "linear") / "metrics.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), "cider": score}))
    table = copied.tables["main"]
    column = table.columns[0].model_copy(update={"metric": "cider"})
    rows = tuple(table.rows[0].model_copy(update={"runs": run, "paper": None}) for run in ("tube", "text"))
    spec = table.model_copy(update={"columns": (column,), "rows": rows})
    cells = paper_table(copied.model_copy(update={"tables": {"main": spec}}), "main").rows
    mean = {False: "140.0 ± 45.8", True: "150.0 ± 10.0"}[bold]
    assert [(row[1].text, row[1].bold) for row in cells] == [("80.0 ± 10.0", False), (mean, bold)]


def test_tables_are_written_with_title_note_and_the_same_bytes(copied: Config) -> None:
    path = write_table(copied, "main")
    first = path.read_bytes()
    assert path == Layout.of(copied).tables / "main.md"
    assert b"**Masks & <more>**" in first and b"Numbers of a <paper>." in first
    assert path.with_suffix(".csv").exists() and write_table(copied, "main").read_bytes() == first


def test_published_numbers_carry_a_mark_that_the_note_explains(copied: Config) -> None:
    text = write_table(copied, "main").read_text(encoding="utf-8")
    assert "| 66.6 \u25d0 |" in text and "| 67.5 \u25cf |" in text and "| 12.0 \u25d0 |" in text
    assert text.endswith(
        "\nNumbers of a <paper>. Published numbers: \u25cf read in the source; \u25d0 at second hand.\n"
    )
    table = copied.tables["main"]
    rows = [row.model_copy(update={"certainty": None}) for row in table.rows]
    unstated = table.model_copy(update={"rows": (rows[0], rows[1].model_copy(update={"certainty": "aggregator"}))})
    unstated = unstated.model_copy(update={"certainty": None, "note": None})
    assert table_note(unstated) == (
        "Published numbers: \u25cb from a site that collects results; ? where it was read is not stated."
    )
    assert table_note(unstated.model_copy(update={"rows": (table.rows[0].model_copy(update={"paper": ()}),)})) == ""
    cells = paper_table(copied.model_copy(update={"tables": {"main": unstated}}), "main").rows
    assert [row[2].note for row in cells] == ["?", "\u25cb"]


def test_a_run_that_trains_only_a_head_is_an_untrained_reference(tmp_path: Path) -> None:
    settings = make_study_config(tmp_path, tables={}, figures={}).model_dump(mode="json")
    head_only = {**settings["pretrain"]["text"], "reconstruction": {"weight": 0}}
    head_only["contrast"] = {**head_only["contrast"], "weight": 0}
    row = {"label": "Tube", "runs": "tube"}
    config = make_study_config(
        tmp_path,
        pretrain={**settings["pretrain"], "head": head_only},
        tables={"main": {"title": "t", "columns": [{"title": "Linear", "task": "linear"}], "rows": [row]}},
        figures={},
    )
    assert untrained_runs(config, config.tables["main"], 0) == ["scratch", "head"]


def test_a_certainty_per_column_needs_one_per_column(tmp_path: Path) -> None:
    columns = [{"title": "Linear", "task": "linear"}]
    row = {"label": "Tube", "runs": "tube", "paper": [1.0], "certainty": ["source", "source"]}
    with pytest.raises(ConfigError, match="2 certainty for 1 columns"):
        make_study_config(tmp_path, tables={"main": {"title": "t", "columns": columns, "rows": [row]}})


@pytest.mark.parametrize("name", ["curves", "heights"])
def test_charts_have_the_same_bytes_twice(name: str, copied: Config) -> None:
    first = write_figure(copied, name).read_bytes()
    assert first.startswith(b"\x89PNG") and len(first) > 5000
    assert write_figure(copied, name).read_bytes() == first


def write_persistence(config: Config, run: str, by_lag: Sequence[float | None]) -> None:
    metrics = {"headline": {}, "ratio": 0.75, "by_lag": by_lag, "chance": {"by_lag": [1.0, 0.25, 0.25]}}
    write_json(Layout.of(config).metrics(run, "kept"), metrics)


def test_the_figure_of_persistence_has_a_curve_per_run_and_that_of_random_masks(tmp_path: Path) -> None:
    """The mean over seeds in per cent, by lag; gaps where no pair of slots is that far apart."""
    figure = {"title": "Kept", "kind": "persistence", "tasks": ["kept"], "runs": {"Tube": "tube", "Text": "text"}}
    kept = {"kept": {"task": "mask_persistence", "runs": ["tube", "text"]}}
    config = make_study_config(tmp_path, evaluate=kept, tables={}, figures={"kept_again": figure})
    for seed, later in enumerate([0.5, 0.6, 0.7]):
        write_persistence(config, f"tube-seed{seed}", [1.0, later, None])
        write_persistence(config, f"text-seed{seed}", [1.0, 0.2, 0.1])
    [axes] = draw_figure(config, "kept_again").axes
    lines = {line.get_label(): np.asarray(line.get_ydata(), float) for line in axes.lines}
    np.testing.assert_allclose(lines["Tube"], [100, 60, np.nan])
    np.testing.assert_allclose(lines["Text"], [100, 20, 10])
    np.testing.assert_allclose(lines["random, expected"], [25, 25])
    assert axes.get_title(loc="left") == "ratio 0.75"
    with pytest.raises(ConfigError, match="objects stay kept, which linear does not"):
        make_study_config(tmp_path, tables={}, figures={"kept_again": {**figure, "tasks": ["linear"]}})


def test_missing_results_are_named_with_the_command_that_makes_them(copied: Config) -> None:
    layout = Layout.of(copied)
    (layout.evaluate("text-seed1", "linear") / "metrics.json").unlink()
    (layout.pretrain("text-seed2") / "metrics.jsonl").unlink()
    with pytest.raises(ReportError, match=r"stm evaluate --run text-seed1 --task linear"):
        write_table(copied, "main")
    with pytest.raises(ReportError, match=r"stm evaluate --run text-seed1 --task linear"):
        write_figure(copied, "heights")
    with pytest.raises(ReportError, match=r"stm pretrain --run text-seed2"):
        write_figure(copied, "curves")


def test_a_missing_metric_is_refused_with_a_list_of_existing_ones(config: Config) -> None:
    with pytest.raises(ReportError, match=r"no r1; it has: .*text_to_video"):
        read_measurement(config, "text", "retrieval", "r1")
    with pytest.raises(ReportError, match="per_class is not a number"):
        read_measurement(config, "text", "linear", "per_class")
    with pytest.raises(ReportError, match="no accuracy; it has: contrast, loss, step"):
        read_curve(config, "text-seed0", "accuracy")


def test_a_step_logged_twice_counts_once(copied: Config) -> None:
    lines = [{"step": 1, "loss": 9.0}, {"step": 2, "loss": 2.0}, {"step": 1, "loss": 1.0}]
    path = Layout.of(copied).pretrain("tube-seed0") / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_curve(copied, "tube-seed0", "loss") == ([1, 2], [1.0, 2.0])


# ------------------------------------------------------------------------------------------------- the page


@pytest.fixture(scope="module")
def page(config: Config, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page's source."""
    built = build_copy(config, tmp_path_factory.mktemp("built") / "copy")
    check_report_files(built)
    return Layout.of(built).report.read_text(encoding="utf-8")


def test_the_config_s_tables_and_figures_come_first(page: str) -> None:
    order = ["table-main", "figure-pictures", "results", "masks", "clips", "quality", "losses", "setup", "reproduce"]
    assert sorted(order, key=lambda name: page.index(f'id="{name}"')) == order
    assert "Masks &amp; &lt;more&gt;" in page and "Numbers of a &lt;paper&gt;." in page
    assert "Masks & <more>" not in page and "<paper>" not in page
    assert "66.6 <small>\u25d0</small>" in page and "\u25cf read in the source; \u25d0 at second hand." in page
    assert page.count('class="chart"') == 3  # contrast, bars, the contrast loss; mask quality was not measured
    whole = re.search(r'class="whole" alt="What is hidden" src="data:image/(?:webp|png);base64,', page)
    assert whole is not None
    assert "could not be read" not in page


def test_every_mask_is_drawn_and_none_is_missing(page: str) -> None:
    section = page[page.index('id="masks"') : page.index('id="clips"')]
    labels = {label.replace("<wbr>", "") for label in re.findall(r'class="label">([^<]*(?:<wbr>[^<]*)*)<', section)}
    assert {
        "tube 0.9",
        "random 0.9",
        "flow 0.9",
        "motion 0.75",
        "motion_box 0.75",
        "text_top 0.6",
        "attention 0.8",
    } <= labels
    not_drawn = section[section.rindex("Not drawn") :]
    assert "spatiotemporal" in not_drawn  # learned by runs of the method stm
    assert "cluster" not in not_drawn


def test_missing_results_are_named_in_place_of_the_table(copied: Config) -> None:
    layout = Layout.of(copied)
    shutil.rmtree(layout.root / "evaluate")
    shutil.rmtree(layout.root / "shards")
    study = collect_study(copied, layout)
    (table,) = show_tables(study)
    assert table.table is None and "stm evaluate --run tube-seed0 --task linear" in table.missing_reason
    shown = {figure.name: figure for figure in show_figures(study, layout)}
    assert "no packed clips" in shown["pictures"].missing_reason and "stm evaluate" in shown["heights"].missing_reason
    assert shown["curves"].svg and not shown["curves"].missing_reason
    assert study.problems == []


def test_a_damaged_result_is_a_problem_and_the_rest_is_shown(copied: Config) -> None:
    layout = Layout.of(copied)
    (layout.evaluate("text-seed1", "linear") / "metrics.json").write_text("{ not json")
    study = collect_study(copied, layout)
    assert show_tables(study)[0].table is None
    assert any(problem.startswith("table main") for problem in study.problems)


@pytest.mark.parametrize("name", ["masks", "clip_1", "masks_near", "loss_curves"])
def test_names_of_the_report_s_own_files_are_refused(name: str, tmp_path: Path) -> None:
    spec = {"title": "t", "kind": "losses", "runs": {"T": "tube"}}
    with pytest.raises(ConfigError, match="report's own"):
        make_config(tmp_path, figures={name: spec})


def test_evaluations_without_classes_have_no_table_per_class(tmp_path: Path) -> None:
    tasks = {"retrieval": {"task": "retrieval", "runs": ["text"]}}
    config = make_study_config(tmp_path, evaluate=tasks, tables={}, figures={})
    assert "per_class.csv" not in table_names(config) and "results.csv" in table_names(config)
