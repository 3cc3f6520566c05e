"""Figures of clips and the mask gallery: each row shows what its label says."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from report_results import copy_results, make_config
from report_study import make_study

from stm.config import AnyRun, Config, FigureSpec, Mask, Teacher
from stm.data.geometry import Geometry
from stm.layout import Layout
from stm.masking import get_strategy, strategy_names, to_boolean
from stm.methods import load_method
from stm.methods.mae import MAE
from stm.models.attention import attention_from, centre_token
from stm.report import write_figure
from stm.report.clips import film_strips
from stm.report.clips.cuts import Cut, cut_clips, frames_row, hidden_share, mask_cut, mask_row
from stm.report.clips.draw import draw_clip_strips, reconstructed_runs
from stm.report.clips.film_strips import Row, Scale
from stm.report.clips.gallery import draw_mask_gallery, ordered_strategies, usual_ratio
from stm.report.clips.select import ReportClip, choose_clips
from stm.report.paper import clips as paper_clips
from stm.report.results.collect import collect, collect_study, find_shards
from stm.report.results.evaluations import ReportError
from stm.report.results.records import Results


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Read-only."""
    return make_study(tmp_path_factory.mktemp("clips"))


@pytest.fixture
def copied(config: Config, tmp_path: Path) -> Config:
    """A copy that a test may damage."""
    return copy_results(config, tmp_path / "copy")


def draw(config: Config, **changes: object) -> list[tuple[str, list[Row]]]:
    """Heading and rows of each clip of the figure `pictures`, changed by `changes`."""
    spec = config.figures["pictures"].model_copy(update=changes)
    return paper_clips._draw_dataset(config, spec, config.name)


@pytest.fixture(scope="module")
def blocks(config: Config) -> list[tuple[str, list[Row]]]:
    return draw(config)


def choose(config: Config) -> list[ReportClip]:
    layout = Layout.of(config)
    return choose_clips(config, layout, find_shards(layout))


# --------------------------------------------------------------------------------------------- the paper's figures


def test_rows_follow_the_order_of_show_once_per_clip_or_run(blocks: list[tuple[str, list[Row]]]) -> None:
    heading, rows = blocks[0]
    assert heading == "test-0   slides right   “an orange square, test-0”"
    # Text samples from one caption only, the others from both, so the first clip has maps of two captions.
    common = [(row.kind, row.label) for row in rows[: -3 * 4]]
    assert common == [("frames", "Frames"), ("map", "Text similarity"), ("map", "Text similarity")]
    each = [(row.kind, row.label) for row in rows[-3 * 4 :]]
    labels = ("Tube", "Text", "Attention", "Untrained")
    assert each == [(kind, label) for label in labels for kind in ("mask", "reconstruction", "attention")]
    assert [row.note for row in rows[-3:]][1:] == ["untrained", "attention of the red patch, untrained"]


def test_a_figure_shows_the_first_clips_of_the_page(config: Config) -> None:
    assert [heading.split()[0] for heading, _ in draw(config, clips=3, show=("frames",))] == [
        "test-0",
        "test-1",
        "test-2",
    ]


def load_mae(run: AnyRun, weights: Path) -> MAE:
    method = load_method(run, weights)
    assert isinstance(method, MAE)
    return method


def test_each_mask_is_the_run_s_own(config: Config, blocks: list[tuple[str, list[Row]]]) -> None:
    """The run's strategy on the run's guides gives the grey patches; no weights are read."""
    for number, name in enumerate(("tube", "text", "attentive")):
        run = config.runs[f"{name}-seed0"]
        cut = cut_clips(choose(config), Geometry.of(run), config.seed, run.captions)[0]
        guides = cut.batch["guides"]
        if name == "attentive":
            method = load_mae(run, Layout.of(config).pretrain("attentive-seed0") / "weights.safetensors")
            guides = method.guide(cut.batch)
        kept = get_strategy(run.mask.strategy)(guides, run.mask.ratio)
        masked = to_boolean(kept, 2, 16)[0].view(2, 4, 4).numpy()
        row = [row for row in blocks[0][1] if row.kind == "mask"][number]
        grey = (row.tiles[::2].reshape(2, 4, 32, 4, 32, 3)[:, :, 12:20, :, 12:20] == film_strips.HIDDEN).mean(
            axis=(2, 4, 5)
        )
        assert ((grey > 0.5) == masked).all()  # the box's outline crosses some


def test_attention_is_that_of_the_encoder_from_the_centre_patch_which_is_marked(
    config: Config, blocks: list[tuple[str, list[Row]]]
) -> None:
    run = config.runs["tube-seed0"]
    encoder = load_mae(run, Layout.of(config).pretrain("tube-seed0") / "weights.safetensors").model.encoder
    cut = cut_clips(choose(config), Geometry.of(run), config.seed)[0]
    row = next(row for row in blocks[0][1] if row.kind == "attention")
    # Two slots of 4 x 4 tokens: the centre is row 2, column 2 of the second slot.
    assert centre_token(encoder.architecture) == 16 + 2 * 4 + 2
    expected = attention_from(encoder, cut.batch["video"], token=26)[0].view(2, 4, 4).numpy() * 32
    expected = np.repeat(expected, 2, axis=0)  # of two slots, both frames are shown
    assert row.scale is not None
    assert (row.scale.low, row.scale.high) == (
        pytest.approx(expected.min()),
        pytest.approx(np.percentile(expected, 99)),
    )
    plain = film_strips.heat_map(cut.frames, expected, row.scale)
    changed = (plain != row.tiles).any(axis=-1)
    assert not changed[:2].any() and changed[2].any() and (changed[2] == changed[3]).all()
    assert not changed[2, 70:90, 70:90].any()  # the patch itself, pixels 64 to 96, keeps its colour inside
    assert (row.tiles[2, 63, 64:96] == film_strips.QUERY).all() and (row.tiles[2, 64:96, 96] == film_strips.QUERY).all()
    ys, xs = np.nonzero(changed[2])
    assert (ys.min(), ys.max(), xs.min(), xs.max()) == (61, 98, 61, 98)


@pytest.mark.parametrize(("side", "position"), [(14, 7), (14, 1), (7, 3), (8, 4)])
def test_the_mark_outlines_its_token(side: int, position: int) -> None:
    tiles = np.zeros((2, 128, 128, 3), np.uint8)
    marked = film_strips.mark_token(tiles, 1, position, position, side)
    inside = film_strips.enlarge(np.arange(side * side).reshape(1, side, side), 128)[0] == position * side + position
    shrunk = inside & np.roll(inside, 1, 0) & np.roll(inside, -1, 0) & np.roll(inside, 1, 1) & np.roll(inside, -1, 1)
    assert not marked[0].any() and not marked[1][shrunk].any()
    around = (marked[1] == film_strips.QUERY).all(axis=-1)
    assert around.any() and tiles.max() == 0
    assert film_strips.mark_token(tiles, 0, 0, side - 1, side).shape == tiles.shape  # at the edge it is cut off


def test_a_long_clip_shows_every_nth_slot_and_always_the_middle_one(config: Config) -> None:
    """Ten slots for at most eight columns: every second slot is shown."""
    run = config.runs["tube-seed0"].model_copy(update={"frames": 20, "stride": 1})
    cut = cut_clips(choose(config), Geometry.of(run), config.seed)[0]
    assert cut.slots == [1, 3, 5, 7, 9]
    assert 5 in cut.slots and cut.frames.shape[0] == 5


def test_rows_that_need_no_weights_are_drawn_without_them(copied: Config) -> None:
    shutil.rmtree(Layout.of(copied).root / "pretrain")
    rows = draw(copied, show=("frames", "similarity", "masks"))[0][1]
    assert [row.kind for row in rows][-4:] == ["mask"] * 4
    for show in ("reconstructions", "attention"):
        with pytest.raises(ReportError, match=r"run `stm pretrain --run tube-seed0`"):
            draw(copied, show=(show,))


def test_weights_of_another_shape_are_refused(copied: Config) -> None:
    run = copied.pretrain["tube"].model_copy(update={"decoder_depth": 2})
    other = copied.model_copy(update={"pretrain": {**copied.pretrain, "tube": run}})
    with pytest.raises(ReportError, match="does not fit the run tube-seed0"):
        draw(other, show=("reconstructions",))
    run = copied.pretrain["tube"].model_copy(update={"frames": 8, "stride": 1})
    other = copied.model_copy(update={"pretrain": {**copied.pretrain, "tube": run}})
    with pytest.raises(ReportError, match=r"frames 4 instead of 8.*pretrain again"):
        draw(other, show=("attention",))


def test_without_clips_the_error_says_what_to_do(copied: Config) -> None:
    shutil.rmtree(Layout.of(copied).root / "shards")
    with pytest.raises(ReportError, match="no packed clips"):
        write_figure(copied, "pictures")


def test_guides_that_are_not_packed_are_named(tmp_path: Path, copied: Config) -> None:
    spec = FigureSpec(title="t", kind="clips", runs={"A": "attentive"}, show=("masks",))
    bare = copied.pretrain["attentive"].model_copy(update={"teacher": None})
    config = copied.model_copy(update={"pretrain": {"attentive": bare}, "figures": {"t": spec}})
    with pytest.raises(ReportError, match="guide that the mask attention of attentive-seed0 needs"):
        write_figure(config, "t")


def test_the_figure_has_all_clips_and_the_same_bytes_twice(copied: Config) -> None:
    spec = copied.figures["pictures"].model_copy(update={"runs": {"Tube": "tube"}})
    config = copied.model_copy(update={"figures": {"pictures": spec}})
    first = write_figure(config, "pictures").read_bytes()
    assert first.startswith(b"\x89PNG") and len(first) > 50_000
    assert write_figure(config, "pictures").read_bytes() == first


@pytest.mark.parametrize(("slots", "clips", "columns"), [(2, 4, 2), (8, 3, 1), (2, 1, 1)])
def test_short_clips_stand_side_by_side(slots: int, clips: int, columns: int) -> None:
    rows = [Row("frames", "Frames", np.zeros((slots, 128, 128, 3), np.uint8))]
    figure = film_strips.compose([(f"clip {i}", rows) for i in range(clips)], "A title")
    places = [axes.get_position() for axes in figure.axes]
    assert len({round(place.x0, 3) for place in places}) == columns
    assert all(min(place.x0, place.y0) >= 0 and max(place.x1, place.y1) <= 1 for place in places)
    assert len({(round(place.x0, 3), round(place.y0, 3)) for place in places}) == clips
    texts = [text.get_text() for text in figure.texts]
    assert texts[0] == "A title" and [text for text in texts if text.startswith("clip")] == [
        f"clip {i}" for i in range(clips)
    ]


def test_labels_fit_beside_their_row() -> None:
    long = "motion_compensated_box 0.75"
    row = Row("map", long, np.zeros((1, 8, 8, 3), np.uint8), "of a note, and more of a note", Scale(0, 1, "cosine"))
    lines = film_strips._label(row).splitlines()
    assert max(map(len, lines)) <= film_strips.LABEL_CHARACTERS
    assert "of a note" in lines and "and more of a note" in lines


# -------------------------------------------------------------------------------------------------- the page's clips


def test_only_the_first_seed_is_reconstructed_and_each_caption_has_one_map(config: Config) -> None:
    layout = Layout.of(config)
    rows = draw_clip_strips(config, layout, collect(config, layout))[0].rows
    reconstructions = [(row.label, row.note, row.run) for row in rows if row.kind == "reconstruction"]
    assert sorted(reconstructions) == [
        ("attentive", "reconstruction", 2),
        ("scratch", "untrained", 3),
        ("text", "reconstruction", 1),
        ("tube", "reconstruction", 0),
    ]
    maps = [(row.label, row.note) for row in rows if row.kind == "map"]
    assert maps == [("Text similarity", ""), ("Motion", ""), ("Text similarity", "“a square & a <tag>”")]
    assert [row.kind for row in rows].count("frames") == 1


def test_only_the_first_eight_runs_that_predict_pixels_are_reconstructed(config: Config) -> None:
    group = collect_study(config, Layout.of(config)).groups[0]
    contrast_only = group.settings.model_copy(
        update={"reconstruction": group.settings.reconstruction.model_copy(update={"weight": 0})}
    )
    groups = []
    for number in range(12):
        settings = contrast_only if number == 2 else group.settings
        run = group.instances[0].__class__(**{**group.instances[0].__dict__, "settings": settings})
        groups.append(group.__class__(f"run{number}", number, [run]))
    assert reconstructed_runs(groups) == [0, 1, 3, 4, 5, 6, 7, 8]


# ------------------------------------------------------------------------------------------------------- all masks


def test_all_strategies_are_drawn_at_their_papers_ratios(config: Config) -> None:
    gallery = draw_mask_gallery(config, Layout.of(config), Results(shards=find_shards(Layout.of(config))))
    assert list(gallery.missing) == ["spatiotemporal"] and "learned" in gallery.missing["spatiotemporal"]
    assert len(gallery.clips) == 2
    labels = [row.label for row in gallery.clips[0].rows]
    drawn = [name for name in ordered_strategies() if name != "spatiotemporal"]
    assert labels == ["Frames", *(f"{name} {usual_ratio(name):g}" for name in drawn)]
    assert sorted(ordered_strategies()) == strategy_names()
    ratios = {name: usual_ratio(name) for name in strategy_names()}
    assert ratios["tube"] == ratios["random"] == ratios["flow"] == 0.9
    assert ratios["motion"] == ratios["motion_box"] == ratios["motion_compensated"] == 0.75
    assert (ratios["text_top"], ratios["text_bottom"], ratios["attention"]) == (0.6, 0.6, 0.8)


def test_a_mask_row_says_how_much_of_the_box_is_hidden(config: Config) -> None:
    cut = cut_clips(choose(config), Geometry.of(config.runs["tube-seed0"]), config.seed)[0]
    masked = mask_cut(cut, "text_top", 0.6)
    assert masked is not None and cut.boxes is not None
    assert masked.sum(axis=(1, 2)).tolist() == [int(0.6 * 16)] * 2
    share = hidden_share(cut.boxes, masked, 2)
    assert mask_row(cut, "m", masked).note == f"hides {100 * share:.0f} % of the box"
    unknown_box = Cut(cut.clip, cut.geometry, cut.batch, cut.caption, cut.frame_indices, cut.frames, None)
    assert mask_row(unknown_box, "m", masked).note == "" and frames_row(unknown_box).note == "4 frames, stride 2"


def test_a_mask_row_says_the_share_of_hidden_tokens_where_truncation_changes_it(config: Config) -> None:
    cut = cut_clips(choose(config), Geometry.of(config.runs["tube-seed0"]), config.seed)[0]
    unknown_box = Cut(cut.clip, cut.geometry, cut.batch, cut.caption, cut.frame_indices, cut.frames, None)
    masked = mask_cut(unknown_box, "tube", 0.9)
    assert masked is not None  # 14 of 16 tokens
    assert mask_row(unknown_box, "m", masked, "tube 0.9", ratio=0.9).note == "tube 0.9, hides 87.5 % of the tokens"
    assert mask_row(unknown_box, "m", masked, ratio=0.875).note == ""


def test_a_strategy_of_the_users_own_is_drawn_and_a_failing_one_stops_no_other(config: Config, tmp_path: Path) -> None:
    code = "from stm.masking import get_strategy, register\n\n"
    code += "@register('fine')\ndef fine(guides, ratio):\n    return get_strategy('tube')(guides, ratio)\n\n"
    code += "@register('failing')\ndef failing(guides, ratio):\n    raise RuntimeError('of its own')\n"
    (tmp_path / "own.py").write_text(code)
    run = config.pretrain["tube"]
    own = {
        name: run.model_copy(update={"mask": Mask(strategy=f"{tmp_path / 'own.py'}:{name}", ratio=0.5)})
        for name in ("fine", "failing")
    }
    changed = config.model_copy(update={"pretrain": {**config.pretrain, **own}})
    results = Results(shards=find_shards(Layout.of(config)))
    gallery = draw_mask_gallery(changed, Layout.of(config), results)
    labels = [row.label for row in gallery.clips[0].rows]
    assert f"{tmp_path / 'own.py'}:fine 0.9" in labels and "tube 0.9" in labels
    assert gallery.missing[f"{tmp_path / 'own.py'}:failing"] == "it could not be drawn"
    assert results.problems == [f"mask {tmp_path / 'own.py'}:failing: RuntimeError: of its own"]


def test_strategies_without_their_guides_are_named_and_do_not_stop_the_others(made_results: Config) -> None:
    """No flow is packed and no run has a teacher."""
    layout = Layout.of(made_results)
    gallery = draw_mask_gallery(made_results, layout, collect(made_results, layout))
    assert gallery.missing.pop("flow") == "no flow maps are packed"
    assert "learned" in gallery.missing.pop("spatiotemporal")
    assert gallery.missing == dict.fromkeys(("attention", "attention_hidden", "cluster"), "no run has a teacher")
    assert len(gallery.clips[0].rows) == 1 + len(strategy_names()) - 5


def test_a_teacher_that_cannot_be_loaded_stops_only_its_own_masks(copied: Config) -> None:
    run = copied.pretrain["attentive"].model_copy(update={"teacher": Teacher(model="local-dir:/nowhere/at/all")})
    config = copied.model_copy(update={"pretrain": {"attentive": run}})
    results = Results(shards=find_shards(Layout.of(config)))
    gallery = draw_mask_gallery(config, Layout.of(config), results)
    assert set(gallery.missing) == {"attention", "attention_hidden", "cluster", "spatiotemporal"}
    assert len(results.problems) == 3
    assert results.problems[0].startswith("mask attention: ModelError")


def test_a_report_without_clips_draws_no_masks(made_results: Config) -> None:
    config = make_config(Path(made_results.results), report={"clips": 0})
    layout = Layout.of(config)
    assert draw_mask_gallery(config, layout, collect(config, layout)).clips == []


def test_attention_covers_all_tokens(config: Config) -> None:
    """The encoder of the figure sees the whole clip, so every token has attention."""
    weights = Layout.of(config).pretrain("text-seed0") / "weights.safetensors"
    encoder = load_mae(config.runs["text-seed0"], weights).model.encoder
    cut = cut_clips(choose(config), Geometry.of(config.runs["text-seed0"]), config.seed)[0]
    attention = attention_from(encoder, cut.batch["video"])
    assert attention.shape == (1, 32) and (attention > 0).all()
    assert torch.allclose(attention.sum(), torch.tensor(1.0))
