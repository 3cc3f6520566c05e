"""Charts and film strips: colours, determinism, and masks that hide what they should."""

import io
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, features

from stm.config import Config
from stm.layout import Layout
from stm.report import figures
from stm.report.clips import film_strips
from stm.report.clips.cuts import hidden_share
from stm.report.results.collect import collect
from stm.report.results.records import MaskQualityRow, Results, Run, RunGroup, group_runs


@pytest.fixture(scope="module")
def results(made_results: Config) -> Results:
    return collect(made_results, Layout.of(made_results))


def test_runs_differ_in_colour_or_dash() -> None:
    styles = {(s["color"], str(s["linestyle"])) for s in map(figures.run_style, range(35))}
    assert len(styles) == 35


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=80), st.floats(0, 1))
@settings(max_examples=50, deadline=None)
def test_running_mean_stays_within_the_values(values: list[float], share: float) -> None:
    means = figures.running_mean(values, share)
    assert len(means) == len(values)
    assert min(values) - 1e-9 <= min(means) and max(means) <= max(values) + 1e-9


def test_running_mean_of_a_line_is_the_line_in_the_middle() -> None:
    line = [float(i) for i in range(100)]
    assert figures.running_mean(line, 0.1)[10:90] == line[10:90]


def test_charts_have_the_same_bytes_twice(made_results: Config, results: Results) -> None:
    groups = group_runs(made_results, results.runs)
    for draw, data in ((figures.loss_curves, groups), (figures.mask_quality_bars, results.mask_quality)):
        first, second = draw(data), draw(data)  # type: ignore[arg-type]
        assert figures.to_png(first) == figures.to_png(second)
        assert figures.to_svg(first, "a", "x") == figures.to_svg(second, "a", "x")


def runs_with(config: Config, *curves: dict[str, list[float]]) -> list[RunGroup]:
    """Runs that log these objectives, at steps 1, 2, 3, ..."""
    run = config.pretrain["tube"]
    groups = []
    for number, logged in enumerate(curves):
        objectives = {name: (list(range(1, len(values) + 1)), values) for name, values in logged.items()}
        steps, losses = next(iter(objectives.values()))
        groups.append(RunGroup(f"run{number}", number, [Run(f"run{number}", run, steps, losses, None, {}, objectives)]))
    return groups


def test_each_objective_has_a_panel_and_each_run_its_line_in_it(made_results: Config) -> None:
    falling = [1.0, 0.9, 0.8, 0.7]
    groups = runs_with(made_results, {"reconstruction": falling}, {"reconstruction": falling, "contrast": falling})
    figure = figures.loss_curves(groups)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["Reconstruction loss", "Contrast loss"]
    drawn = [
        {line.get_label(): line.get_color() for line in axes.lines if line.get_label()[0] != "_"}
        for axes in figure.axes
    ]
    assert [list(lines) for lines in drawn] == [["run0: tube 0.75", "run1: tube 0.75"], ["run1: tube 0.75"]]
    assert drawn[0]["run1: tube 0.75"] == drawn[1]["run1: tube 0.75"] == figures.swatch(1)["color"]


def test_a_spike_at_the_start_does_not_flatten_the_curves(made_results: Config) -> None:
    later = [1.0 - 0.001 * step for step in range(39)]
    (axes,) = figures.loss_curves(runs_with(made_results, {"reconstruction": [500.0, *later]})).axes
    low, high = axes.get_ylim()
    assert 0.9 < low < min(later) and max(later[4:]) < high < 1.1
    assert "first values outside the axis" in axes.get_title(loc="left")


def test_a_wide_range_is_logarithmic_and_says_so(made_results: Config) -> None:
    (axes,) = figures.loss_curves(runs_with(made_results, {"matching": [100 * 0.9**step for step in range(60)]})).axes
    assert axes.get_yscale() == "log" and "log scale" in axes.get_title(loc="left")


def test_the_legend_is_outside_all_panels(made_results: Config) -> None:
    curve = [1.0, 0.9, 0.8, 0.7]
    figure = figures.loss_curves(
        runs_with(made_results, {"reconstruction": curve, "contrast": curve}, {"matching": curve})
    )
    figures.to_png(figure)
    (legend,) = figure.legends
    assert not any(legend.get_window_extent().overlaps(axes.get_window_extent()) for axes in figure.axes)


def test_charts_without_data_say_so() -> None:
    assert "no losses" in figures.to_svg(figures.loss_curves([]), "a", "x")
    assert "no mask quality" in figures.to_svg(figures.mask_quality_bars([]), "a", "x")


def test_svg_takes_ink_from_the_page_and_ids_do_not_clash(results: Results) -> None:
    svg = figures.to_svg(figures.mask_quality_bars(results.mask_quality), "quality", 'a "quoted" <name>')
    assert not {figures.INK, figures.MUTED, figures.GRID} & set(re.findall(r"#[0-9a-f]{6}", svg))
    assert "var(--ink)" in svg
    assert "<style" not in svg and "<metadata" not in svg
    assert all(name.startswith("quality-") for name in re.findall(r'\bid="([^"]*)"', svg))
    assert set(re.findall(r'href="#([^"]*)"', svg)) <= set(re.findall(r'\bid="([^"]*)"', svg))
    assert "&quot;quoted&quot; &lt;name&gt;" in svg


def test_text_from_data_is_neither_markup_nor_mathematics() -> None:
    rows = [MaskQualityRow("<script>$x^$", "a&b", "fixed", 0.5, 0.7, None, 3, 0.5)]
    svg = figures.to_svg(figures.mask_quality_bars(rows), "q", "x")
    assert "<script>" not in svg and "&lt;script&gt;$x^$" in svg
    assert figures.to_png(film_strips.compose([("$\\frac{ caption $", [])])).startswith(b"\x89PNG")


def random_tiles(slots: int = 2, side: int = 128) -> film_strips.Tiles:
    return np.random.default_rng(0).integers(0, 100, (slots, side, side, 3), dtype=np.uint8)


def test_grey_patches_are_exactly_the_masked_ones() -> None:
    tiles, masked = random_tiles(), np.random.default_rng(1).random((2, 4, 4)) < 0.5
    grey = film_strips.grey_out(tiles, masked)
    blocks = grey.reshape(2, 4, 32, 4, 32, 3)
    assert ((blocks == film_strips.HIDDEN).all(axis=(2, 4, 5)) == masked).all()
    assert (grey == tiles).all(axis=-1)[~np.kron(masked, np.ones((1, 32, 32), bool))].all()


def test_tokens_keep_their_order_when_the_tile_is_not_a_multiple_of_the_grid() -> None:
    grid = np.arange(9.0).reshape(1, 3, 3)
    large = film_strips.enlarge(grid, 128)
    assert large.shape == (1, 128, 128)
    assert set(np.unique(large)) == set(range(9))
    assert (np.diff(large[0, 0]) >= 0).all() and (np.diff(large[0, :, 0]) >= 0).all()


def test_heat_uses_the_ends_of_the_colour_map() -> None:
    tiles = np.zeros((1, 128, 128, 3), np.uint8)
    overlay = film_strips.heat_map(tiles, np.array([[[0.0, 1.0], [0.0, 1.0]]], np.float32), film_strips.Scale(0, 1, ""))
    low, high = (np.array([int(c[i : i + 2], 16) for i in (1, 3, 5)]) for c in film_strips.colormap_stops(2))
    assert np.abs(overlay[0, 0, 0] - 0.62 * low).max() <= 1
    assert np.abs(overlay[0, 0, -1] - 0.62 * high).max() <= 1
    flat = film_strips.heat_map(tiles, np.full((1, 2, 2), 0.3, np.float32), film_strips.Scale(0.3, 0.3, ""))
    assert (flat == flat[0, 0, 0]).all()


def test_a_box_is_an_outline_and_none_is_drawn_where_there_is_none() -> None:
    tiles = random_tiles()
    drawn = film_strips.draw_boxes(tiles, np.array([[0.25, 0.25, 0.75, 0.75], [np.nan] * 4]))
    assert (drawn[1] == tiles[1]).all()
    changed = (drawn[0] != tiles[0]).any(axis=-1)
    assert not changed[40:88, 40:88].any() and not changed[:32].any() and not changed[:, 96:].any()
    assert (drawn[0, 33, 40:88] == film_strips.BOX).all()


@pytest.mark.parametrize("box", [[0.0, 0.0, 0.001, 0.001], [0.99, 0.99, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]])
def test_boxes_at_the_edges_raise_no_error(box: list[float]) -> None:
    assert film_strips.draw_boxes(random_tiles(1), np.array([box])).shape == (1, 128, 128, 3)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_hidden_share_agrees_with_counting_pixels(seed: int) -> None:
    generator = np.random.default_rng(seed)
    side, pixels, tubelet, frames = 4, 64, 2, 4
    corners = np.sort(generator.integers(0, pixels + 1, (frames, 2, 2)), axis=1).astype(float)
    boxes = corners.reshape(frames, 4) / pixels
    empty = (boxes[:, 2:] <= boxes[:, :2]).any(axis=1)
    boxes[empty] = np.nan
    masked = generator.random((frames // tubelet, side, side)) < 0.5
    area = hidden = 0
    for frame in range(frames):
        if not empty[frame]:
            x0, y0, x1, y1 = np.rint(boxes[frame] * pixels).astype(int)
            fine = np.kron(masked[frame // tubelet], np.ones((pixels // side,) * 2, bool))
            area += (x1 - x0) * (y1 - y0)
            hidden += int(fine[y0:y1, x0:x1].sum())
    share = hidden_share(boxes, masked, tubelet)
    assert share is None if area == 0 else share == pytest.approx(hidden / area)


@pytest.mark.parametrize("webp", [True, False])
def test_a_strip_is_an_image_with_transparent_gaps(webp: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    available = features.check("webp")
    monkeypatch.setattr(features, "check", lambda name: webp and available)
    media, data = film_strips.encode(random_tiles(3))
    image = Image.open(io.BytesIO(data))
    assert media == f"image/{image.format.lower()}" and (webp and available) == (media == "image/webp")
    assert image.size == (3 * 128 + 2 * film_strips.GAP, 128)
    assert image.getchannel("A").getpixel((129, 5)) == 0


@pytest.mark.parametrize(("side", "shown"), [(32, 128), (96, 96), (128, 128), (224, 128)])
def test_small_frames_are_enlarged_and_large_ones_reduced(side: int, shown: int) -> None:
    assert film_strips.resize(random_tiles(2, side)).shape == (2, shown, shown, 3)
