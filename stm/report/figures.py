"""Charts of loss curves and mask quality, each drawn once and written both as PNG and as SVG for the page.

The SVG inherits its text and line colours from the page's style sheet, so that it is legible in light and dark mode.
"""

import html
import io
import math
import re
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import matplotlib.lines
import matplotlib.patches
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from stm.report.results.records import Curve, MaskQualityRow, Run, RunGroup
from stm.report.tables import camera_title

# Okabe and Ito's palette without its yellow, which is too light for lines: distinguishable with all common types of
# colour blindness. https://jfly.uni-koeln.de/color/
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
DASHES: tuple[Any, ...] = ("solid", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 1.5, 1.5, 1.5)), (0, (10, 2)))
MAX_FAINT = 8  # runs; with more, logged values behind the curves would hide the curves
LOG_RANGE = 10.0  # a panel whose highest value is more than this many times its lowest has a logarithmic axis
SPIKE = 3.0  # the first values are cut off if they would make the range of the axis this many times larger
CAMERAS = {"fixed": "#0072B2", "moving": "#E69F00"}

# Placeholders that `to_svg` replaces with the style sheet's variables. No other colour may equal one of them.
INK, MUTED, GRID = "#101112", "#606162", "#d0d1d2"
VARIABLES = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--rule)"}

STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # ships with matplotlib, so that charts look the same on every machine
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "svg.fonttype": "none",
    "text.parse_math": False,  # names may contain dollar signs
    "legend.frameon": False,
}


def run_style(number: int) -> dict[str, Any]:
    """Return a run's colour and dash style, by its index in the config; the same in every chart and on the page.

    Both change from run to run, so that neither colour vision nor a printer in colour is needed; the first 35 runs differ.
    """
    return {"color": PALETTE[number % len(PALETTE)], "linestyle": DASHES[number % len(DASHES)]}


def swatch(number: int) -> dict[str, str]:
    """Return a run's colour and dash as the attributes of an SVG line, 2 units wide."""
    style = run_style(number)
    dashes = "" if style["linestyle"] == "solid" else " ".join(f"{1.3 * length:g}" for length in style["linestyle"][1])
    return {"color": str(style["color"]), "dashes": dashes}


def name_run(run: RunGroup) -> str:
    """Label a run as `text: text_top 0.6`, or as `tube 0.9` if it is named after its strategy."""
    strategy, ratio = run.mask
    return f"{strategy} {ratio:g}" if strategy == run.name else f"{run.name}: {strategy} {ratio:g}"


def new_figure(height: float, width: float = 7.6) -> Figure:
    """Create a figure of `width` x `height` inches with a transparent background."""
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0)
    return figure


def find_objectives(groups: Sequence[RunGroup]) -> list[str]:
    """Return the logged objectives, in the order of their first run; `loss`, their sum, if a run logs only that."""
    logged = [run for group in groups for run in group.instances if run.losses]
    names = dict.fromkeys(name for run in logged for name in (run.objectives or ("loss",)))
    return list(names)


def loss_curves(groups: Sequence[RunGroup]) -> Figure:
    """Draw the curves of all runs, smoothed by a running mean: one panel per objective, and a legend beside them.

    Runs with several seeds show the mean and the range over the seeds; runs with one seed show the logged values behind
    the curve.
    """
    objectives = find_objectives(groups)
    logged = [group for group in groups if any(run.losses for run in group.instances)]
    rows = max(1, math.ceil(len(objectives) / 2))
    with mpl.rc_context(STYLE):
        figure = new_figure(max(2.7 * rows, 0.4 + 0.165 * len(logged)))
        if not objectives:
            show_message(figure.add_subplot(facecolor="none"), "no losses were logged")
            return figure
        for place, objective in enumerate(objectives):
            columns = min(2, len(objectives))
            draw_panel(figure.add_subplot(rows, columns, place + 1, facecolor="none"), groups, objective)
        handles = [mpl.lines.Line2D([], [], label=name_run(group), **run_style(group.number)) for group in logged]
        figure.legend(handles=handles, loc="outside right upper", labelcolor=INK, fontsize=7.5, handlelength=2.8)
    return figure


def loss_panel(groups: Sequence[RunGroup], objective: str) -> Figure:
    """Draw the panel of one objective without a legend, for the page."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.6, 2.9), layout="constrained")
        figure.patch.set_alpha(0)
        draw_panel(figure.add_subplot(facecolor="none"), groups, objective)
    return figure


def draw_panel(axes: Any, groups: Sequence[RunGroup], objective: str) -> None:
    """Draw one objective of all runs that have it, on an axis that fits their curves but not a spike at the start."""
    members = [group for group in groups if any(curve_of(run, objective)[0] for run in group.instances)]
    crowded = sum(any(run.losses for run in group.instances) for group in groups) > MAX_FAINT
    smoothed: list[list[float]] = []
    for group in members:
        curves = [curve for run in group.instances if (curve := curve_of(run, objective))[0]]
        steps, means = mean_curves(curves)
        if len(curves) == 1 and not crowded:
            axes.plot(*curves[0], color=run_style(group.number)["color"], linewidth=0.6, alpha=0.28)
        plot_mean_and_range(axes, steps, means, name_run(group), 1.6, run_style(group.number))
        smoothed += means
    axes.set_title(title_objective(objective) + fit_axis(axes, smoothed), fontsize=9.5, loc="left")
    axes.set(xlabel="Optimiser step")
    axes.grid(axis="y")
    axes.margins(x=0.01)


def curve_of(run: Run, objective: str) -> Curve:
    """Return the logged steps and values of an objective; `loss` is the total of a run that logs no objectives."""
    if objective == "loss":
        return ([], []) if run.objectives else (run.steps, run.losses)
    return run.objectives.get(objective, ([], []))


def title_objective(objective: str) -> str:
    """Return a human-readable name for an objective in metrics.jsonl: `masked_language` -> `Masked language loss`."""
    return "Loss" if objective == "loss" else f"{objective.replace('_', ' ').capitalize()} loss"


def fit_axis(axes: Any, curves: Sequence[Sequence[float]]) -> str:
    """Set the range of the y axis so that a spike at the start does not flatten the curves; return a note for the title."""
    values = [value for curve in curves for value in curve]
    later = [value for curve in curves for value in curve[math.ceil(len(curve) / 10) :]]
    if not later:
        return ""
    low, high, notes = min(values), max(values), []
    if high - low > SPIKE * (max(later) - min(later)) > 0:
        low, high = min(later), max(later)
        notes = ["first values outside the axis"]
    if low > 0 and high > LOG_RANGE * low:
        axes.set_yscale("log")
        low, high = low / 1.1, high * 1.1
        notes.append("log scale")
    else:
        margin = 0.06 * (high - low) or 0.05 * abs(high) or 0.05
        low, high = low - margin, high + margin
    axes.set_ylim(low, high)
    return f" ({', '.join(notes)})" if notes else ""


def plot_mean_and_range(
    axes: Any, steps: Sequence[int], curves: Sequence[Sequence[float]], label: str, width: float, style: dict[str, Any]
) -> None:
    """Plot the mean of the curves over seeds, one value per step, and, for several seeds, their range as a band."""
    marker = "o" if len(steps) == 1 else None  # a line with a single point is invisible
    middle = [sum(values) / len(values) for values in zip(*curves, strict=True)]
    axes.plot(steps, middle, label=label, linewidth=width, marker=marker, **style)
    if len(curves) > 1:
        low, high = ([bound(values) for values in zip(*curves, strict=True)] for bound in (min, max))
        axes.fill_between(steps, low, high, color=style["color"], alpha=0.18, linewidth=0)


def mean_curves(curves: Sequence[Curve]) -> tuple[list[int], list[list[float]]]:
    """Return the steps that all curves have, and each curve's running mean at these steps."""
    steps = sorted(set.intersection(*(set(curve[0]) for curve in curves)))
    means = []
    for curve_steps, values in curves:
        smooth = dict(zip(curve_steps, running_mean(values), strict=True))
        means.append([smooth[step] for step in steps])
    return steps, means


def running_mean(values: Sequence[float], share: float = 0.05) -> list[float]:
    """Running mean over windows of `share` of the curve's length, shortened at the ends; preserves the length."""
    half = int(len(values) * share / 2)
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def mask_quality_bars(rows: Sequence[MaskQualityRow], width: float = 7.6) -> Figure:
    """Draw the hidden fraction of the object's box per mask and camera, with confidence interval and chance level.

    The chart is `width` inches wide.
    """
    with mpl.rc_context(STYLE):
        several_datasets = len({row.dataset for row in rows}) > 1
        names = [f"{row.dataset}: {row.name}" if several_datasets else row.name for row in rows]
        groups = list(dict.fromkeys((name, row.ratio) for name, row in zip(names, rows, strict=True)))
        cameras = list(dict.fromkeys(row.camera for row in sorted(rows, key=lambda row: row.camera)))
        figure = new_figure(max(2.0, 0.9 + 0.2 * len(groups) * (len(cameras) + 0.8)), width)
        axes = figure.add_subplot(facecolor="none")
        thickness = 0.8 / max(1, len(cameras))
        for name, row in zip(names, rows, strict=True):
            group, camera = groups.index((name, row.ratio)), cameras.index(row.camera)
            middle = group - 0.4 + thickness * (camera + 0.5)
            color = CAMERAS.get(row.camera, PALETTE[-1])
            axes.barh(middle, 100 * row.coverage, thickness * 0.88, color=color, linewidth=0)
            if row.interval is not None:
                low, high = row.interval
                axes.plot([100 * low, 100 * high], [middle, middle], color=INK, linewidth=1.1)
            axes.plot(
                [100 * row.chance] * 2, [group - 0.46, group + 0.46], color=INK, linewidth=1.2, linestyle=(0, (3, 2))
            )
        axes.set_yticks(range(len(groups)), [f"{name}\nratio {ratio:g}" for name, ratio in groups])
        axes.set_ylim(max(1, len(groups)) - 0.4, -0.6)  # first row at the top
        axes.set(xlim=(0, 100), xlabel="Share of the object's box that is hidden, %")
        axes.grid(axis="x")
        axes.set_axisbelow(True)
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        if not rows:
            show_message(axes, "no mask quality was measured")
        else:
            _legend(figure, cameras)
    return figure


def _legend(figure: Figure, cameras: Sequence[str]) -> None:
    handles: list[Any] = [mpl.patches.Patch(color=CAMERAS.get(c, PALETTE[-1]), label=camera_title(c)) for c in cameras]
    handles.append(mpl.lines.Line2D([], [], color=INK, linewidth=1.1, label="95 % interval"))
    handles.append(mpl.lines.Line2D([], [], color=INK, linewidth=1.2, linestyle=(0, (3, 2)), label="Chance"))
    columns = len(handles) if figure.get_figwidth() > 6 else 2
    figure.legend(handles=handles, loc="outside upper left", ncols=columns, labelcolor=INK, fontsize=9)


def show_message(axes: Any, text: str) -> None:
    """Show a message in place of a chart that has no data."""
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=MUTED)
    axes.set(xticks=[], yticks=[])


def to_png(figure: Figure) -> bytes:
    """Encode as PNG: opaque white background, 200 dpi, no metadata, so that equal figures have equal bytes."""
    sink = io.BytesIO()
    FigureCanvasAgg(figure)
    with mpl.rc_context(STYLE):
        figure.savefig(sink, format="png", dpi=200, facecolor="white", metadata={"Software": None})
    return sink.getvalue()


def to_svg(figure: Figure, name: str, description: str) -> str:
    """Render an `<svg>` element for the page, with the page's fonts and the style sheet's colours.

    Args:
        figure: the chart.
        name: prefix of all ids, which must not clash with those of other charts on the page.
        description: the accessible label.
    """
    sink = io.StringIO()
    FigureCanvasSVG(figure)
    metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with mpl.rc_context({**STYLE, "svg.hashsalt": name}):
        figure.savefig(sink, format="svg", transparent=True, metadata=metadata)
    svg = sink.getvalue()
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(href="|url\()#', rf"\1#{name}-", svg)
    svg = svg.replace("font-family: 'DejaVu Sans', sans-serif; ", "")
    for color, variable in VARIABLES.items():
        svg = svg.replace(color, variable)
    view = re.search(r'viewBox="[^"]*"', svg)
    assert view is not None, "matplotlib writes a viewBox"
    opening = f'<svg class="chart" role="img" aria-label="{html.escape(description)}" {view.group()}'
    opening += ' xmlns:xlink="http://www.w3.org/1999/xlink">'
    return opening + svg[svg.index(">") + 1 :]
