"""Reading metrics.json: the headline as the file describes it, other metrics as their task declares them."""

import json
from pathlib import Path
from typing import Any

import pytest
from report_study import RUN, make_study_config

from stm.config import Config
from stm.layout import Layout
from stm.report.figures import to_svg
from stm.report.page import sentences
from stm.report.paper.figures import draw_bars
from stm.report.paper.tables import paper_table
from stm.report.results.collect import collect_study
from stm.report.results.evaluations import ReportError, read_evaluation, read_measurement
from stm.report.tables import results_table
from stm.storage.files import write_json


def recalls(r1: float, median: float) -> dict[str, Any]:
    figures = {"r1": r1, "r5": 0.9, "r10": 1.0, "median_rank": median, "mean_rank": 5.0}
    bounds = {"r1": [r1 - 0.05, r1 + 0.05], "r5": [0.8, 0.95], "r10": [0.9, 1.0]}
    directions = ("text_to_video", "video_to_text")
    return {
        **dict.fromkeys(directions, figures),
        "confidence95": dict.fromkeys(directions, bounds),
        "queries": 12,
        "clips": 9,
    }


def headline(name: str, label: str, value: float, **more: Any) -> dict[str, Any]:
    defaults = {"interval": None, "chance": None, "higher_is_better": True, "scale": 100, "unit": "%"}
    return {"name": name, "label": label, "value": value, **defaults, **more}


def write(config: Config, run: str, task: str, metrics: dict[str, Any]) -> Path:
    path = Layout.of(config).evaluate(run, task) / "metrics.json"
    write_json(path, {"task": config.evaluate[task].task, **metrics})
    return path


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Two runs with text, each evaluated by retrieval, questions and captions."""
    teacher = {"model": "local-dir:none", "layers": 1}
    run = {key: value for key, value in RUN.items() if key != "decoder_depth"}
    run |= {"method": "umt", "teacher": teacher, "language": {"model": "local-dir:none"}}
    run |= {"mask": {"strategy": "tube", "ratio": 0.5}}
    columns = [
        {"title": "Re-ranked", "task": "find", "metric": "reranked.text_to_video.r1"},
        {"title": "Dual", "task": "find", "metric": "dual_encoder.text_to_video.r1"},
        {"title": "Median", "task": "find", "metric": "reranked.text_to_video.median_rank"},
        {"title": "Headline", "task": "captions"},
    ]
    rows = [{"label": name, "runs": name} for name in ("a", "b")]
    bars = {"title": "Bars", "kind": "bars", "tasks": ["find"], "runs": {"A": "a", "B": "b"}}
    config = make_study_config(
        tmp_path,
        seeds=[],
        pretrain={"a": run, "b": run},
        evaluate={
            "find": {"task": "video_text_retrieval"},
            "questions": {"task": "question_answering"},
            "captions": {"task": "captioning"},
        },
        tables={"both": {"title": "Both", "columns": columns, "rows": rows}},
        figures={"bars": bars, "dual_encoder": {**bars, "metric": "dual_encoder.text_to_video.r1"}},
    )
    for name, shift in (("a", 0.0), ("b", 0.1)):
        best = headline("reranked.text_to_video.r1", "text-to-video R@1", 0.5 + shift, interval=[0.4, 0.7], chance=0.2)
        parts = {"reranked": recalls(0.5 + shift, 4.0 + shift), "dual_encoder": recalls(0.3 - shift, 6.0)}
        write(config, name, "find", {"headline": best, **parts, "chance": {"r1": 0.2, "r5": 0.6, "r10": 1.0}})
        answered = headline("accuracy", "accuracy", 0.4 + shift, interval=[0.3, 0.6], chance=0.13)
        write(config, name, "questions", {"headline": answered, "accuracy": 0.4 + shift, "most_frequent_answer": 0.13})
        caption_score = headline("cider", "CIDEr", 1.4 - shift, unit="")
        write(config, name, "captions", {"headline": caption_score, "cider": 1.4 - shift, "bleu4": 0.2})
    return config


def test_results_show_the_file_s_chance_and_cider_without_a_per_cent_sign(config: Config) -> None:
    """Chance must be that of the file: one over a whole number of classes, 1 / round(1 / 0.13), would be 12.5 %."""
    study = collect_study(config, Layout.of(config))
    table = results_table(config, study.groups, sentences.chances(study.groups))
    assert table.columns[-3:] == ["find, text-to-video R@1 %", "questions, accuracy %", "captions, CIDEr"]
    cells = [[(cell.text, cell.note, cell.bold) for cell in row[-3:]] for row in table.rows]
    assert cells[0] == [("50.0", "[40.0, 70.0]", False), ("40.0", "[30.0, 60.0]", False), ("140.0", "", False)]
    assert cells[1] == [("60.0", "[40.0, 70.0]", False), ("50.0", "[30.0, 60.0]", False), ("130.0", "", False)]
    assert table.outcomes[-1] == ("captions", "Without intervals, the runs cannot be compared.")
    assert [cell.text for cell in table.footer[0][-3:]] == ["20.0", "13.0", "\u2013"]
    assert table.keys[-15::5] == ["find_r1", "questions_accuracy", "captions_cider"]


def test_tables_know_interval_and_direction_of_each_number(config: Config) -> None:
    """Only the dual encoder's intervals, 25 to 35 and 15 to 25, might be apart, and they touch."""
    table = paper_table(config, "both")
    first, second = table.rows
    assert [cell.text for cell in first[1:]] == ["50.0", "30.0", "4.0", "140.0"]
    assert [cell.text for cell in second[1:]] == ["60.0", "20.0", "4.1", "130.0"]
    assert not any(cell.bold for cell in first + second)
    assert [sentence for _, sentence in table.outcomes] == [
        "Above chance: a, b. a and b are not told apart.",
        "Above chance: a. a and b are not told apart.",
        "Without intervals, the rows cannot be compared.",
        "Without intervals, the rows cannot be compared.",
    ]
    assert [cell.note for cell in first[1:]] == ["[40.0, 70.0]", "[25.0, 35.0]", "", ""]


def test_bars_show_the_headline_by_its_name(config: Config) -> None:
    svg = to_svg(draw_bars(config, "bars"), "bars", "Bars")
    assert "Text-to-video R@1, %" in svg and ">60.0<" in svg
    svg = to_svg(draw_bars(config, "dual_encoder"), "dual_encoder", "Bars")
    assert ">20.0<" in svg and ">60.0<" not in svg


def test_a_lower_headline_is_the_better_one_where_the_file_says_so(config: Config) -> None:
    for name, rank in (("a", 3.0), ("b", 7.0)):
        bounds = {"interval": [rank - 1, rank + 1], "chance": 10.0}
        best = headline("rank", "median rank", rank, higher_is_better=False, scale=1, unit="", **bounds)
        write(config, name, "find", {"headline": best, "rank": rank})
    study = collect_study(config, Layout.of(config))
    table = results_table(config, study.groups, {})
    assert [row[-3].text for row in table.rows] == ["3.0", "7.0"]
    assert [row[-3].bold for row in table.rows] == [True, False]
    assert table.outcomes[0][1] == "Better than chance: a, b. a is better than all other pretrained runs."


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda metrics: metrics.pop("headline"), "no headline: .*run `stm evaluate --run a --task find` again"),
        (lambda metrics: metrics["headline"].pop("value"), "metrics.json has no value; it has: chance, dual_encoder, headline"),
        (lambda metrics: metrics["headline"].update(value="high"), "reranked.text_to_video.r1 is not a number"),
    ],
)  # fmt: skip
def test_a_file_without_a_headline_that_can_be_read_is_named(config: Config, damage: Any, message: str) -> None:
    path = Layout.of(config).evaluate("a", "find") / "metrics.json"
    metrics = json.loads(path.read_text())
    damage(metrics)
    path.write_text(json.dumps(metrics))
    with pytest.raises(ReportError, match=message):
        read_measurement(config, "a", "find")
    with pytest.raises(ReportError, match=message):
        read_evaluation(path, "a", "find")
