"""A config of several datasets: one page for all of them, and the names of its files."""

import csv
import re
import shutil
from pathlib import Path

import pytest
import yaml
from report_results import build_copy, check_report_files, check_same_bytes, copy_results
from report_study import make_several

from stm.config import Config, parse_config
from stm.layout import Layout
from stm.report import build_report, write_figure
from stm.report.names import figure_names, shown_datasets
from stm.report.page.context import dump_config
from stm.report.results.collect import collect_study
from stm.report.results.provenance import collect_provenance


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Read-only."""
    return make_several(tmp_path_factory.mktemp("several"))


@pytest.fixture(scope="module")
def built(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Config:
    return build_copy(config, tmp_path_factory.mktemp("built") / "copy")


@pytest.fixture(scope="module")
def page(built: Config) -> str:
    return Layout.of(built).report.read_text(encoding="utf-8")


def test_all_declared_files_are_written_into_the_config_s_own_folder(built: Config) -> None:
    check_report_files(built)
    layout = Layout.of(built)
    assert {path.name for path in layout.root.iterdir()} == {
        "report.html",
        "tables",
        "figures",
        "plan.json",
        "provenance.json",
    }
    assert not (Layout.of(built, "near").root / "report.html").exists()


def test_clips_come_from_the_datasets_that_runs_train_on(config: Config) -> None:
    assert shown_datasets(config) == ["near", "far"]
    assert figure_names(config) == [
        "loss_curves.png",
        "mask_quality.png",
        "clip_near_1.png",
        "masks_near.png",
        "clip_far_1.png",
        "masks_far.png",
    ]
    assert shown_datasets(config.model_copy(update={"pretrain": {}})) == ["near", "far", "unused"]


def test_two_builds_give_the_same_bytes(built: Config) -> None:
    check_same_bytes(built)


def test_runs_are_read_from_the_dataset_that_they_train_on(config: Config) -> None:
    study = collect_study(config, Layout.of(config))
    assert [group.name for group in study.groups] == ["text", "tube"]
    assert [[run.name for run in dataset.results.runs] for dataset in study.datasets] == [["text"], ["tube"], []]
    assert all(set(group.instances[0].evaluations) == {"linear", "transfer"} for group in study.groups)
    assert study.problems == []


def test_tables_name_the_dataset(built: Config) -> None:
    tables = Layout.of(built).tables
    results = list(csv.DictReader((tables / "results.csv").open()))
    assert [(row["run"], row["dataset"]) for row in results] == [("text", "near"), ("tube", "far"), ("chance", "")]
    refused = list(csv.DictReader((tables / "quarantine.csv").open()))
    assert {row["dataset"] for row in refused} == {"near", "far", "unused"}
    assert next(csv.DictReader((tables / "mask_quality.csv").open()))["dataset"] == "near"


def test_time_is_summed_over_datasets_and_compared_with_the_plan(config: Config) -> None:
    layout = Layout.of(config)
    frames, pretrain = collect_provenance(collect_study(config, layout), layout).stages
    assert (frames.name, frames.jobs, frames.seconds, frames.planned_jobs) == ("frames", 3, 30.0, 5)
    assert frames.planned_cpu_seconds == pytest.approx(108.0)
    assert (pretrain.planned_gpu_seconds, pretrain.planned_loading_seconds) == (pytest.approx(360.0), 1800.0)


def test_receipts_are_named_as_in_the_plan(config: Config) -> None:
    layout = Layout.of(config)
    receipts = collect_provenance(collect_study(config, layout), layout).receipts
    assert {"frames/near", "frames/far", "similarity/near/human", "captions/unused/human", "shards/far"} <= set(
        receipts
    )
    assert "evaluate/text/transfer" in receipts


def test_the_page_has_a_part_per_dataset(page: str) -> None:
    setup = page[page.index('id="setup"') : page.index('id="input"')]
    assert [setup.count(f"<h3>{name}</h3>") for name in ("near", "far", "unused")] == [1, 1, 1]
    clips = page[page.index('id="clips"') : page.index('id="quality"')]
    assert [clips.count(f"<h3>{name}</h3>") for name in ("near", "far", "unused")] == [1, 1, 0]
    assert page.index('id="table-both"') < page.index('id="setup"')
    quality = page[page.index('id="quality"') : page.index('id="losses"')]
    assert re.search(r"<td[^>]*>near</td><td[^>]*>text</td><td[^>]*>human</td>", quality)
    assert "could not be read" not in page


def test_a_figure_of_runs_on_two_datasets_shows_the_clips_of_both(built: Config) -> None:
    assert write_figure(built, "masks-of-both").read_bytes().startswith(b"\x89PNG")
    (Layout.of(built).figures / "masks-of-both.png").unlink()


def test_the_config_on_the_page_parses_to_the_same_datasets(config: Config) -> None:
    again = parse_config(yaml.safe_load(dump_config(config)))
    assert again.dataset_names == config.dataset_names
    for name in config.dataset_names:
        assert again.of(name) == config.of(name)
    assert (again.runs, again.evaluate, again.tables) == (config.runs, config.evaluate, config.tables)


@pytest.mark.parametrize("missing", ["near", "both", "everything"])
def test_a_missing_dataset_does_not_stop_the_page(missing: str, config: Config, tmp_path: Path) -> None:
    damaged = copy_results(config, tmp_path / "copy")
    if missing == "everything":
        shutil.rmtree(tmp_path / "copy")
    else:
        shutil.rmtree(tmp_path / "copy" / missing)
    build_report(damaged, Layout.of(damaged))
    text = Layout.of(damaged).report.read_text(encoding="utf-8")
    expected = {"near": "no manifest of near.", "both": "There is no plan.", "everything": "No job was timed"}[missing]
    assert expected in text
    assert sorted(path.name for path in Layout.of(damaged).figures.iterdir()) == sorted(figure_names(damaged))
