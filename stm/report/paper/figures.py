"""Config figures of the kinds `losses`, `bars` and `persistence`: curves and evaluation results over seeds."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from stm.config import Config
from stm.layout import Layout
from stm.report.figures import (
    INK,
    STYLE,
    fit_axis,
    new_figure,
    plot_mean_and_range,
    run_style,
    running_mean,
    show_message,
)
from stm.report.results.evaluations import ReportError, read_all_metrics, read_measurement
from stm.report.results.records import NOT_LOSSES, Curve, Measurement


def read_curve(config: Config, instance: str, metric: str) -> Curve:
    """Read steps and values of one metric from the metrics.jsonl of an instance.

    Raises:
        ReportError: there is no log, or the log has no such metric.
    """
    path = Layout.of(config, config.dataset_of(instance)).pretrain(instance) / "metrics.jsonl"
    if not path.exists():
        raise ReportError(
            f"{path} is missing; run `stm pretrain --run {instance}` with the same --config, or the workflow"
        )
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    # A resumed run may repeat a step; only the later result affected the weights.
    by_step = {int(line["step"]): float(line[metric]) for line in lines if metric in line}
    if not by_step and lines:
        raise ReportError(f"{path} has no {metric}; it has: {', '.join(sorted(lines[-1]))}")
    return sorted(by_step), [by_step[step] for step in sorted(by_step)]


def draw_losses(config: Config, name: str) -> Figure:
    """Draw the figure `name`: for each run, the mean curve and the range over its seeds."""
    spec = config.figures[name]
    metric = spec.metric or "loss"
    curves = {
        label: [read_curve(config, instance, metric) for instance in config.instances(run)]
        for label, run in spec.runs.items()
    }
    with mpl.rc_context(STYLE):
        figure = new_figure(3.8)
        axes = figure.add_subplot(facecolor="none")
        smoothed: list[list[float]] = []
        for label, seeds in curves.items():
            seeds = [curve for curve in seeds if curve[0]]
            if not seeds:
                continue
            steps = sorted(set.intersection(*(set(curve[0]) for curve in seeds)))
            by_step = [dict(zip(*curve, strict=True)) for curve in seeds]
            values = [running_mean([logged[step] for step in steps], 0.02) for logged in by_step]
            plot_mean_and_range(axes, steps, values, label, 1.6, style_of(config, spec.runs[label]))
            smoothed += values
        axes.set(xlabel="Optimiser step", ylabel=_name_metric(metric) + fit_axis(axes, smoothed))
        axes.set_title(spec.title, fontsize=10, loc="left")
        axes.grid(axis="y")
        axes.margins(x=0.01)
        if any(curve[0] for seeds in curves.values() for curve in seeds):
            axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), labelcolor=INK, fontsize=8.5)
        else:
            show_message(axes, "nothing was logged")
    return figure


def style_of(config: Config, run: str) -> dict[str, Any]:
    """Return the colour and dash of a run of the config's `pretrain`: the same in every figure."""
    return run_style(list(config.pretrain).index(run))


def _name_metric(metric: str) -> str:
    """Return a human-readable name for a key of metrics.jsonl: `contrast` -> `Contrast loss`."""
    name = metric.replace("_", " ").capitalize()
    return name if metric in ("loss", *NOT_LOSSES) else f"{name} loss"


def draw_bars(config: Config, name: str) -> Figure:
    """Draw the figure `name`: one group of bars per evaluation, one bar per run.

    Lines mark 95 % intervals, and dots individual seeds.
    """
    spec = config.figures[name]
    measurements = {
        task: {label: read_measurement(config, run, task, spec.metric) for label, run in spec.runs.items()}
        for task in spec.tasks
    }
    with mpl.rc_context(STYLE):
        figure = new_figure(3.4)
        axes = figure.add_subplot(facecolor="none")
        for group, bars in enumerate(measurements.values()):
            styles = {label: style_of(config, run) for label, run in spec.runs.items()}
            _draw_group(axes, group, bars, styles, named=group == 0)
        axes.set_xticks(range(len(measurements)), list(measurements))
        axes.set(ylabel=_name_metrics(measurements))
        axes.set_title(spec.title, fontsize=10, loc="left")
        axes.tick_params(axis="x", length=0, labelcolor=INK)
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), labelcolor=INK, fontsize=8.5)
    return figure


def draw_persistence(config: Config, name: str) -> Figure:
    """Draw the figure `name`: of the slots that show an object some slots after one in which it is kept, the share in which it is
    kept; for each run the mean and the range over its seeds, one panel per evaluation, and random masks of its ratio.
    """
    spec = config.figures[name]
    with mpl.rc_context(STYLE):
        figure = new_figure(3.4)
        panels = figure.subplots(1, len(spec.tasks), sharey=True, squeeze=False)[0]
        for axes, task in zip(panels, spec.tasks, strict=True):
            measured = {label: read_all_metrics(config, run, task) for label, run in spec.runs.items()}
            ratios = sorted({float(seed["ratio"]) for seeds in measured.values() for seed in seeds})
            lags = list(range(min(len(seed["by_lag"]) for seeds in measured.values() for seed in seeds)))
            for label, seeds in measured.items():
                values = [[_percent(seed["by_lag"][lag]) for lag in lags] for seed in seeds]
                plot_mean_and_range(axes, lags, values, label, 1.6, style_of(config, spec.runs[label]))
            for ratio in ratios:  # the clips are those of all runs, and so is chance at equal ratios
                first = next(seed for seeds in measured.values() for seed in seeds if seed["ratio"] == ratio)
                chance = [_percent(first["chance"]["by_lag"][lag]) for lag in lags[1:]]
                axes.plot(lags[1:], chance, color=INK, linewidth=0.9, linestyle=":", label="random, expected")
            axes.set_title(f"ratio {' or '.join(f'{ratio:g}' for ratio in ratios)}", fontsize=8.5, loc="left")
            axes.set(xlabel="Slots later")
            axes.set_xticks(lags)
            axes.grid(axis="y")
        panels[0].set(ylabel="Object kept again, %", ylim=(0, 103))
        panels[-1].legend(loc="upper left", bbox_to_anchor=(1.01, 1), labelcolor=INK, fontsize=8.5)
        figure.suptitle(spec.title, fontsize=10, x=0.01, ha="left")
    return figure


def _percent(share: float | None) -> float:
    return math.nan if share is None else 100 * share


def _name_metrics(measurements: Mapping[str, Mapping[str, Measurement]]) -> str:
    """Return an axis label such as `Top-1, %`; lists every metric if the evaluations have different ones."""
    first = [next(iter(bars.values())) for bars in measurements.values()]
    names = dict.fromkeys(", ".join(filter(None, (bar.label, bar.unit))) for bar in first)
    return " or ".join(name[:1].upper() + name[1:] for name in names)


def _draw_group(
    axes: mpl.axes.Axes,
    group: int,
    bars: Mapping[str, Measurement],
    styles: Mapping[str, Mapping[str, Any]],
    named: bool,
) -> None:
    width = 0.8 / len(bars)
    for place, (label, bar) in enumerate(bars.items()):
        x = group - 0.4 + width * (place + 0.5)
        outline = {"edgecolor": INK, "linewidth": 0.9, "linestyle": styles[label]["linestyle"]}
        color = styles[label]["color"]
        axes.bar(x, bar.scale * bar.mean, width * 0.86, facecolor=color, label=label if named else None, **outline)
        if len(bar.values) > 1:
            axes.plot([x] * len(bar.values), [bar.scale * v for v in bar.values], "o", color=INK, markersize=2.5)
        if bar.interval is not None:
            axes.plot([x, x], [bar.scale * bound for bound in bar.interval], color=INK, linewidth=1.1)
        axes.annotate(
            f"{bar.scale * bar.mean:.1f}", (x, _top(bar)), (0, 4), textcoords="offset points", ha="center", fontsize=7.5
        )


def _top(bar: Measurement) -> float:
    """Return the height of a bar including its dots or interval; the bar's value is written above it."""
    heights: Sequence[float] = [*bar.values, *(bar.interval or ())]
    return bar.scale * max(heights, default=math.nan)
