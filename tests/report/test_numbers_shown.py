"""Every number of a results folder is shown in its place: on the page, in the tables, and as data of the charts.

The numbers are made up, each occurs once, and what must be shown is computed here from their definitions.
"""

import csv
import json
import math
import statistics
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from report_results import RUN

from stm.config import Config, parse_config
from stm.layout import Layout
from stm.report import build_report, figures
from stm.report.paper.figures import draw_bars, draw_losses
from stm.report.paper.write import write_table
from stm.report.results.collect import collect_study
from stm.storage.files import write_json

DASH = "\u2013"
WITH_TEXT = {
    **{key: value for key, value in RUN.items() if key != "decoder_depth"},
    **{"method": "umt", "teacher": {"model": "local-dir:none", "layers": 1}, "language": {"model": "local-dir:none"}},
    "mask": {"strategy": "tube", "ratio": 0.5},
}
# Runs: `best` is apart from all others in every column but one, `seeded` has three seeds, `blank` is untrained.
RUNS: dict[str, dict[str, Any]] = {
    "other": {**WITH_TEXT, "mask": {"strategy": "random", "ratio": 0.7}},
    "best": WITH_TEXT,
    "seeded": {**WITH_TEXT, "seeds": [3, 5, 8], "mask": {"strategy": "tube", "ratio": 0.8}},
    "blank": {**WITH_TEXT, "optimisation": {**RUN["optimisation"], "epochs": 0}},
}
INSTANCES = {"other": ["other"], "best": ["best"], "blank": ["blank"]}
INSTANCES["seeded"] = ["seeded-seed3", "seeded-seed5", "seeded-seed8"]
TASKS = {
    "probe": {"task": "linear"},
    "find": {"task": "video_text_retrieval"},
    "ask": {"task": "question_answering"},
    "choose": {"task": "multiple_choice"},
    "describe": {"task": "captioning"},
}
# Values by instance, in thousandths; the intervals are 11 thousandths below and 13 above.
HEADLINES = {
    "probe": {"other": 412, "best": 731, "seeded-seed3": 504, "seeded-seed5": 509, "seeded-seed8": 517, "blank": 203},
    "find": {"other": 423, "best": 742, "seeded-seed3": 521, "seeded-seed5": 526, "seeded-seed8": 533, "blank": 214},
    "ask": {"other": 434, "best": 753, "seeded-seed3": 541, "seeded-seed5": 548, "seeded-seed8": 557, "blank": 225},
    # Not apart from `other`: nothing is bold.
    "choose": {"other": 751, "best": 764, "seeded-seed3": 561, "seeded-seed5": 567, "seeded-seed8": 574, "blank": 236},
    # CIDEr, without intervals.
    "describe": {
        "other": 845,
        "best": 1775,
        "seeded-seed3": 981,
        "seeded-seed5": 988,
        "seeded-seed8": 999,
        "blank": 47,
    },
}
CHANCES = {"probe": 0.125, "find": 0.031, "ask": 0.173, "choose": 0.2, "describe": None}
NAMES = {
    "probe": "top1",
    "find": "reranked.text_to_video.r1",
    "ask": "accuracy",
    "choose": "accuracy",
    "describe": "cider",
}
LABELS = {"probe": "top-1", "find": "text-to-video R@1", "ask": "accuracy", "choose": "accuracy", "describe": "CIDEr"}
T_975 = 4.3027  # Student's t, 2 degrees of freedom


def interval(value: float) -> list[float]:
    return [value - 0.011, value + 0.013]


def retrieval(part: str, direction: str, instance: str) -> dict[str, float]:
    """Recalls and ranks, different for every part, direction and run."""
    first = HEADLINES["find"][instance] / 1000
    shift = {"reranked": 0.0, "dual_encoder": -0.107}[part] + {"text_to_video": 0.0, "video_to_text": 0.029}[direction]
    recalls = {"r1": first + shift, "r5": first + shift + 0.061, "r10": first + shift + 0.083}
    return {**recalls, "median_rank": 20 * (1 - first) + 10 * shift, "mean_rank": 30 * (1 - first) + 10 * shift}


def metrics_of(task: str, instance: str) -> dict[str, Any]:
    value, chance = HEADLINES[task][instance] / 1000, CHANCES[task]
    headline = {
        **{"name": NAMES[task], "label": LABELS[task], "value": value, "chance": chance, "higher_is_better": True},
        **{"scale": 100, "unit": "" if task == "describe" else "%"},
        "interval": None if task == "describe" else interval(value),
    }
    more: dict[str, Any] = {"top1": value, "top5": value + 0.1, "confidence95": interval(value), "chance": chance}
    if task == "probe":
        more["per_class"] = {
            label: {"accuracy": value + shift} for label, shift in (("jumps", 0.017), ("rolls", -0.019))
        }
    if task == "find":
        parts = ("reranked", "dual_encoder")
        more = {"chance": {"r1": 0.031, "r5": 0.155, "r10": 0.31}}
        for part in parts:
            found = {name: retrieval(part, name, instance) for name in ("text_to_video", "video_to_text")}
            bounds = {name: {r: interval(found[name][r]) for r in ("r1", "r5", "r10")} for name in found}
            more[part] = {**found, "confidence95": bounds}
    if task == "ask":
        more = {"accuracy": value, "confidence95": interval(value), "most_frequent_answer": chance}
    if task == "describe":
        more = {"cider": value, "bleu4": value / 5}
    return {"task": TASKS[task]["task"], "headline": headline, **more}


COLUMNS = [
    ("Re-ranked", "find", "reranked.text_to_video.r1"),
    ("Dual", "find", "dual_encoder.text_to_video.r1"),
    ("Back", "find", "reranked.video_to_text.r10"),
    ("Rank", "find", "dual_encoder.text_to_video.median_rank"),
    ("Answers", "ask", None),
    ("BLEU", "describe", "bleu4"),
]
MASKS = [
    ("text_top", "said", "fixed", 0.6, 0.931, 0.589), ("text_top", "said", "moving", 0.6, 0.887, 0.589),
    ("motion", None, "fixed", 0.6, 0.722, 0.589), ("motion", None, "moving", 0.6, 0.679, 0.589),
]  # fmt: skip


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A results folder of metrics, logs and mask quality, and its report."""
    folder = tmp_path_factory.mktemp("numbers")
    columns = [{"title": name, "task": task, **({"metric": m} if m else {})} for name, task, m in COLUMNS]
    rows = [
        {"label": f"Row {run}", "runs": run, "paper": [10.5 + i, None, 20.5 + i, None, None, None]}
        for i, run in enumerate(RUNS)
    ]
    values: dict[str, Any] = {
        "name": "numbers",
        "results": str(folder),
        "dataset": {"source": "moving-shapes"},
        "captions": {"said": {"kind": "human"}},
        "pack": {"captions": "said"},
        "mask_quality": {},
        "pretrain": RUNS,
        "evaluate": TASKS,
        "tables": {"own": {"title": "Own", "columns": columns, "rows": rows, "certainty": "source"}},
        "figures": {
            "bars": {"title": "B", "kind": "bars", "tasks": ["probe", "ask"], "runs": {"S": "seeded", "B": "best"}},
            "losses": {"title": "L", "kind": "losses", "metric": "contrast", "runs": {"S": "seeded", "B": "best"}},
        },
        "report": {
            "clips": 0,
            "expect": [
                {"says": "One.", "run": "best", "evaluation": "probe", "above": "other"},
                {"says": "Two.", "run": "other", "evaluation": "ask", "below": "chance"},
                {"says": "Three.", "run": "other", "evaluation": "choose", "above": 0.75},
            ],
        },
    }
    config = parse_config(values)
    layout = Layout.of(config)
    for task in TASKS:
        for instance in HEADLINES[task]:
            write_json(layout.metrics(instance, task), metrics_of(task, instance))
    for number, instance in enumerate(HEADLINES["probe"]):
        lines = [{"step": step, "loss": loss(number, step), "contrast": 2 * loss(number, step)} for step in (10, 20)]
        layout.pretrain(instance).mkdir(parents=True)
        (layout.pretrain(instance) / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    quality = [
        {"guide": guide, "source": source, "camera": camera, "ratio": ratio, "coverage": value, "chance": chance,
         "low": interval(value)[0], "high": interval(value)[1], "clips": 40 + n}
        for n, (guide, source, camera, ratio, value, chance) in enumerate(MASKS)
    ]  # fmt: skip
    write_json(layout.mask_quality, {"split": "test", "rows": quality})
    write_table(config, "own")
    build_report(config, layout)
    return config


def loss(number: int, step: int) -> float:
    return 1.0 + number / 8 - step / 100


class Tables(HTMLParser):
    """The tables of a page by the start of their caption's text: rows of (text, bold, note)."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.found: dict[str, list[list[tuple[str, bool, str]]]] = {}
        self._caption = self._part = ""
        self._cell = ["", "", ""]  # text, bold text, note
        self._place: int | None = None
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag in ("figcaption", "summary"):
            self._caption, self._part = "", tag
        elif tag == "tr":
            self.found.setdefault(self._caption, []).append([])
        elif tag in ("td", "th"):
            self._cell, self._place = ["", "", ""], 0
        elif tag in ("b", "small") and self._place is not None:
            self._place = 1 if tag == "b" else 2

    def handle_endtag(self, tag: str) -> None:
        if tag in ("figcaption", "summary"):
            self._part = ""
        elif tag in ("td", "th"):
            text, bold, note = self._cell
            self.found[self._caption][-1].append((bold or text.strip(), bool(bold), note))
            self._place = None
        elif tag in ("b", "small") and self._place is not None:
            self._place = 0

    def handle_data(self, data: str) -> None:
        if self._part:
            self._caption += data
        elif self._place is not None:
            self._cell[self._place] += data

    def rows(self, words: str) -> list[list[tuple[str, bool, str]]]:
        (found,) = [rows for caption, rows in self.found.items() if words in caption]
        return found


@pytest.fixture(scope="module")
def page(config: Config) -> Tables:
    return Tables(Layout.of(config).report)


def shown(values: list[float], bounds: list[list[float]] | None, scale: float = 100.0) -> tuple[str, str]:
    """Text and note of a cell: mean ± standard deviation, and the interval of the mean."""
    mean = sum(values) / len(values)
    if len(values) == 1:
        text, span = f"{scale * mean:.1f}", bounds and bounds[0]
    else:
        spread = statistics.stdev(values)
        half = T_975 * spread / math.sqrt(len(values))
        text, span = f"{scale * mean:.1f} ± {scale * spread:.1f}", [mean - half, mean + half]
        if bounds:
            own = [statistics.fmean(bound[end] for bound in bounds) for end in (0, 1)]
            span = [min(span[0], own[0]), max(span[1], own[1])]
    return text, f"[{scale * span[0]:.1f}, {scale * span[1]:.1f}]" if span else ""


def headline_cell(task: str, run: str) -> tuple[str, str]:
    values = [HEADLINES[task][instance] / 1000 for instance in INSTANCES[run]]
    return shown(values, None if task == "describe" else [interval(value) for value in values])


def test_results_show_each_headline_its_interval_and_the_best(page: Tables) -> None:
    header, *rows, chance = page.rows("Results of all pretraining runs")
    titles = ["probe, top-1 %", "find, text-to-video R@1 %", "ask, accuracy %", "choose, accuracy %", "describe, CIDEr"]
    assert [text for text, _, _ in header] == ["Run", "Mask", "Ratio", "Epochs", "Final loss", *titles]
    assert [[text for text, _, _ in row[:4]] for row in rows] == [
        ["other", "random", "0.70", "2"],
        ["best", "tube", "0.50", "2"],
        ["seeded", "tube", "0.80", "2"],
        ["blank", "tube", "0.50", "0"],
    ]
    for row in rows:
        run = row[0][0]
        assert [(text, note) for text, _, note in row[5:]] == [headline_cell(task, run) for task in TASKS]
        # In `choose`, `other` is not apart; captions have no intervals.
        assert [bold for _, bold, _ in row[5:]] == [run == "best"] * 3 + [False] * 2
    assert [text for text, _, _ in chance[5:]] == ["12.5", "3.1", "17.3", "20.0", DASH]


def test_final_losses_are_those_of_the_runs(page: Tables) -> None:
    _, *rows, _ = page.rows("Results of all pretraining runs")
    last = {instance: loss(number, 20) for number, instance in enumerate(HEADLINES["probe"])}
    for row in rows:
        values = [last[instance] for instance in INSTANCES[row[0][0]]]
        spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
        assert row[4][0] == f"{sum(values) / len(values):.4f}{spread}"


def test_the_csv_has_the_same_numbers_unrounded(config: Config) -> None:
    rows = {row["run"]: row for row in csv.DictReader((Layout.of(config).tables / "results.csv").open())}
    for task in TASKS:
        key = NAMES[task].rpartition(".")[2]
        for run, instances in INSTANCES.items():
            values = [HEADLINES[task][instance] / 1000 for instance in instances]
            row = {part: rows[run][f"{task}_{part}"] for part in (key, "deviation", "seeds", "low", "high")}
            assert float(row[key]) == pytest.approx(statistics.fmean(values), abs=1e-6)
            assert row["seeds"] == str(len(values)) and bool(row["deviation"]) == (len(values) > 1)
            if len(values) == 1 and task != "describe":
                assert [float(row["low"]), float(row["high"])] == pytest.approx(interval(values[0]), abs=1e-6)


def test_the_table_of_the_config_shows_the_metrics_that_it_names(config: Config, page: Tables) -> None:
    header, *rows = page.rows("Own")
    titles = ["Re-ranked", "paper", "Dual", "Back", "paper", "Rank", "Answers", "BLEU"]
    assert [text for text, _, _ in header] == ["", *titles]
    for number, (row, run) in enumerate(zip(rows, RUNS, strict=True)):
        assert row[0][0] == f"Row {run}"
        cells = {title: cell for title, cell in zip(titles, row[1:], strict=True) if title != "paper"}
        for title, task, metric in COLUMNS:
            values = [at(metrics_of(task, instance), metric or NAMES[task]) for instance in INSTANCES[run]]
            rank, without = title == "Rank", title in ("Rank", "BLEU")
            expected = shown(values, None if without else [interval(v) for v in values], 1.0 if rank else 100.0)
            assert (cells[title][0], cells[title][2]) == expected, (title, run)
            assert cells[title][1] == (run == "best" and not without), (title, run)
        assert [row[2], row[5]] == [
            (f"{10.5 + number:.1f}", False, "\u25cf"),
            (f"{20.5 + number:.1f}", False, "\u25cf"),
        ]
    text = (Layout.of(config).tables / "own.md").read_text(encoding="utf-8")
    assert text.count("**74.2") == 1  # the re-ranked recall of `best`


def at(metrics: Mapping[str, Any], name: str) -> float:
    value: Any = metrics
    for key in name.split("."):
        value = value[key]
    return float(value)


def test_the_lowest_rank_is_bold_where_ranks_have_intervals(config: Config) -> None:
    """Three seeds give intervals: 6 ranks apart from those of the other run, in the other direction of the recalls."""
    runs = {"near": {**WITH_TEXT, "seeds": [1, 2, 3]}, "far": {**WITH_TEXT, "seeds": [1, 2, 3]}}
    column = {"title": "Rank", "task": "find", "metric": "reranked.text_to_video.median_rank"}
    rows = [{"label": run, "runs": run} for run in ("far", "near")]
    table = {"own": {"title": "T", "columns": [column], "rows": rows}}
    values = config.model_dump(mode="json", exclude_defaults=True) | {"pretrain": runs, "tables": table, "figures": {}}
    ranks = parse_config({**values, "name": "ranks", "report": {}, "evaluate": {"find": TASKS["find"]}})
    for run, start in (("near", 3.0), ("far", 9.0)):
        for seed in (1, 2, 3):
            metrics = metrics_of("find", "best")
            metrics["reranked"]["text_to_video"]["median_rank"] = start + seed / 10
            write_json(Layout.of(ranks).metrics(f"{run}-seed{seed}", "find"), metrics)
    text = write_table(ranks, "own").read_text(encoding="utf-8")
    assert "| near | **3.2 ± 0.1" in text and "| far | 9.2 ± 0.1" in text


def test_classes_show_their_own_accuracy(page: Tables) -> None:
    header, *rows = page.rows("Accuracy per class")
    assert [text for text, _, _ in header] == ["Evaluation", "Class", *RUNS]
    for row, (label, shift) in zip(rows, (("jumps", 0.017), ("rolls", -0.019)), strict=True):
        means = [statistics.fmean(HEADLINES["probe"][i] / 1000 for i in INSTANCES[run]) + shift for run in RUNS]
        assert [text for text, _, _ in row] == ["probe", label, *(f"{100 * mean:.1f}" for mean in means)]


def test_masks_show_coverage_per_camera_and_their_chance(page: Tables) -> None:
    _, text, motion = page.rows("true box that masks hide")
    assert [cell[0] for cell in text] == ["text_top", "said", "0.60", "58.9", "93.1", "88.7"]
    assert [cell[0] for cell in motion] == ["motion", DASH, "0.60", "58.9", "72.2", "67.9"]
    assert [cell[1:] for cell in text[4:]] == [(True, "[92.0, 94.4]"), (True, "[87.6, 90.0]")]
    assert not any(bold for _, bold, _ in motion)


def test_expectations_show_both_numbers_and_what_came_out(config: Config) -> None:
    first, second, third = csv.DictReader((Layout.of(config).tables / "expectations.csv").open())
    assert {"0.731", "0.72", "0.744", "0.412", "0.401", "0.425", "held"} <= set(first.values())
    assert {"0.434", "0.423", "0.447", "0.173", "did not hold"} <= set(second.values())
    assert {"0.751", "0.74", "0.764", "0.75", "not told apart"} <= set(third.values())


def test_bars_have_the_heights_of_the_means_and_the_lines_of_the_intervals(config: Config) -> None:
    axes: Any = draw_bars(config, "bars").axes[0]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["probe", "ask"]
    bars = [(task, run) for task in ("probe", "ask") for run in ("seeded", "best")]
    heights = [100 * statistics.fmean(HEADLINES[task][i] / 1000 for i in INSTANCES[run]) for task, run in bars]
    assert [patch.get_height() for patch in axes.patches] == pytest.approx(heights)
    assert [text.get_text() for text in axes.texts] == [f"{height:.1f}" for height in heights]
    lines = [line.get_ydata() for line in axes.lines if line.get_marker() == "None"]
    notes = [headline_cell(task, run)[1] for task, run in bars]
    assert [f"[{low:.1f}, {high:.1f}]" for low, high in lines] == notes
    dots = [list(line.get_ydata()) for line in axes.lines if line.get_marker() == "o"]
    assert dots == [pytest.approx([HEADLINES[task][i] / 10 for i in INSTANCES["seeded"]]) for task in ("probe", "ask")]
    colors = [figures.swatch(list(RUNS).index(run))["color"] for run in ("seeded", "best")]
    handles, labels = axes.get_legend_handles_labels()
    assert labels == ["S", "B"]
    assert [to_hex(handle.patches[0].get_facecolor()) for handle in handles] == [color.lower() for color in colors]


def to_hex(color: tuple[float, ...]) -> str:
    return "#" + "".join(f"{round(255 * part):02x}" for part in color[:3])


def test_curves_are_the_named_loss_of_the_named_runs(config: Config) -> None:
    axes: Any = draw_losses(config, "losses").axes[0]
    numbers = {instance: number for number, instance in enumerate(HEADLINES["probe"])}
    for label, run in (("S", "seeded"), ("B", "best")):
        (line,) = [line for line in axes.lines if line.get_label() == label]
        means = [statistics.fmean(2 * loss(numbers[i], step) for i in INSTANCES[run]) for step in (10, 20)]
        assert list(line.get_xdata()) == [10, 20] and list(line.get_ydata()) == pytest.approx(means)


def test_the_chart_of_masks_has_their_coverage_interval_and_chance(config: Config) -> None:
    study = collect_study(config, Layout.of(config))
    axes: Any = figures.mask_quality_bars(study.mask_quality).axes[0]
    assert [patch.get_width() for patch in axes.patches] == pytest.approx([100 * row[4] for row in MASKS])
    spans = [list(line.get_xdata()) for line in axes.lines]
    for _, _, _, _, value, chance in MASKS:
        assert any(span == pytest.approx([100 * bound for bound in interval(value)]) for span in spans)
        assert any(span == pytest.approx([100 * chance] * 2) for span in spans)
