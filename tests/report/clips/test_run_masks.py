"""Masks of UMT, STM and ClusterSTM on the page: equal to those of the training step, with marks in the right places."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from report_results import make_config, write_offline

from stm.config import Config, FigureSpec, LanguageRun, PretrainRun
from stm.data.geometry import Geometry
from stm.layout import Layout
from stm.masking import to_boolean
from stm.masking.cluster import cluster_tokens
from stm.masking.spatiotemporal import draw_blobs
from stm.methods.clusterstm import ClusterWise
from stm.methods.stm import SpatioTemporalBranch
from stm.methods.umt import UnmaskedTeacher
from stm.models.teachers.frame_teacher import FrameTeacher
from stm.models.vit import VideoEncoder
from stm.models.weights import zoo
from stm.report.clips import film_strips
from stm.report.clips.cuts import Cut, cut_clips
from stm.report.clips.draw import draw_clip_strips
from stm.report.clips.film_strips import Row
from stm.report.clips.run_masks import FORMER, KEPT, LATTER, draw_run_masks, guide_rows, place_points, run_mask_row
from stm.report.clips.select import choose_clips
from stm.report.paper import clips as paper_clips
from stm.report.results.collect import collect, find_shards
from stm.report.results.evaluations import ReportError

ROOT = Path(__file__).resolve().parents[3]
BRANCHES = {"umt": UnmaskedTeacher, "stm": SpatioTemporalBranch, "clusterstm": ClusterWise}
RUN = {
    "model": "tiny", "image_size": 32, "patch_size": 4, "frames": 4, "workers": 0,
    "teacher": {"model": f"local-dir:{ROOT}/stm/assets/demo-clip", "layers": 1},
    "optimisation": {"epochs": 1, "batch_size": 2, "warmup_epochs": 0},
}  # fmt: skip
NO_TEXT_LOSSES = {"objectives": {"contrastive": 0, "matching": 0, "masked_language": 0}}
STM = {**RUN, **NO_TEXT_LOSSES, "method": "stm"}
RUNS = {
    # Has the same mask as umt, which is shown only once.
    "scratch": {**RUN, **NO_TEXT_LOSSES, "method": "umt", "optimisation": {"epochs": 0}},
    "umt": {**RUN, **NO_TEXT_LOSSES, "method": "umt"},
    "stm": {**STM, "spatio_temporal": {"width": 16}},
    "released": {**STM, "spatio_temporal": {"width": 16, "sampling": "as_released"}},
    # Needs a language model, which has no effect on the mask.
    "clusters": {**RUN, "method": "clusterstm", "language": {"model": str(ROOT / "stm/assets/demo-bert")},
                 "cluster": {"cutoff": 0.2}},
}  # fmt: skip


@cache
def load_teacher() -> FrameTeacher:
    return FrameTeacher.load(LanguageRun.model_validate(RUNS["umt"]).teacher, side=8)


def build_branch(run: PretrainRun | LanguageRun) -> torch.nn.Module:
    """The branch that draws the masks in training, with scattered points and a mix of 0.25."""
    assert isinstance(run, LanguageRun)
    teacher = load_teacher()
    torch.manual_seed(3)
    branch = BRANCHES[run.method](run, zoo.describe(run), teacher)
    if run.method == "stm":
        with torch.no_grad():
            branch.predictor.predictor.point[-1].weight.normal_(std=3)
            branch.predictor.mix.fill_(0.25)
    return branch.eval()


def write_weights(config: Config, name: str) -> Path:
    run, path = config.runs[name], Layout.of(config).pretrain(name) / "weights.safetensors"
    branch = build_branch(run)
    zoo.save(VideoEncoder(zoo.describe(run)), path, extra={"branch": branch.state_dict()}, header={"branch": {}})
    return path


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Packed clips, and weights of the runs whose masks are learned. Read-only."""
    changes = {"pretrain": RUNS, "evaluate": {}, "mask_quality": None}
    config = make_config(tmp_path_factory.mktemp("masks"), pack={"captions": "human", "text": True}, **changes)
    write_offline(Layout.of(config), config)
    for name in ("stm", "released"):
        write_weights(config, name)
    return config


@pytest.fixture(scope="module")
def cuts(config: Config) -> list[Cut]:
    layout = Layout.of(config)
    clips = choose_clips(config, layout, find_shards(layout))
    return cut_clips(clips, Geometry.of(config.runs["stm"]), config.seed)


def language_run(config: Config, name: str) -> LanguageRun:
    run = config.runs[name]
    assert isinstance(run, LanguageRun)
    return run


def weights_of(config: Config, name: str) -> Path:
    return Layout.of(config).pretrain(name) / "weights.safetensors"


def find_marks(tile: film_strips.Tiles, color: tuple[int, int, int]) -> np.ndarray:
    """Pixels of exactly that colour, bool [side, side]."""
    return (tile == color).all(axis=-1)


# --------------------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("name", ["umt", "stm", "released", "clusters"])
def test_the_mask_is_the_one_that_the_training_step_draws(name: str, config: Config, cuts: list[Cut]) -> None:
    run, branch = language_run(config, name), build_branch(config.runs[name])
    for mask in draw_run_masks(run, weights_of(config, name), cuts):
        with torch.no_grad():
            kept, _ = branch.mask(mask.cut.batch, load_teacher()(mask.cut.batch["video"]))
        assert (mask.masked.reshape(4, 64) == to_boolean(kept, 4, 64)[0].numpy()).all()


def test_a_learned_mask_is_deterministic_and_depends_on_the_sampling(config: Config, cuts: list[Cut]) -> None:
    drawn = [draw_run_masks(language_run(config, "stm"), weights_of(config, "stm"), cuts)[0] for _ in range(2)]
    assert (drawn[0].masked == drawn[1].masked).all()
    other = draw_run_masks(language_run(config, "released"), weights_of(config, "released"), cuts)[0]
    assert (drawn[0].masked != other.masked).any()


# ---------------------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize("side", [8, 14])
def test_a_point_is_placed_on_the_highest_token_of_its_blob(side: int) -> None:
    points = torch.rand(500, 2, generator=torch.Generator().manual_seed(0)) * 1.5 - 0.75
    blobs = draw_blobs(points, side).numpy()
    column, row = np.floor(place_points(points.numpy(), side) * side).astype(int).T
    assert (blobs[np.arange(500), row * side + column] == blobs.max(axis=1)).all()
    ends = place_points(np.array([[-1, 0], [1, 0]], np.float32), side)
    assert np.allclose(ends * side, [[0.5, side / 2], [side - 0.5, side / 2]])


def test_dots_and_squares_mark_the_points_of_the_pairs(config: Config, cuts: list[Cut]) -> None:
    mask = draw_run_masks(language_run(config, "stm"), weights_of(config, "stm"), cuts)[0]
    row, size = guide_rows(mask, "STM")[0], cuts[0].frames.shape[1]
    points = build_branch(config.runs["stm"]).predictor.compare(mask.teacher.stem, 4).points[0].detach().numpy()
    assert np.ptp(points.reshape(-1, 2), axis=0).min() > 0.01
    former = [points[0, 0], points[1, 0], points[2, 0], points[2, 0]]
    for slot, point in enumerate(former):
        ys, xs = np.nonzero(find_marks(row.tiles[slot], FORMER))
        # Between the outermost tokens' middles, 1/16 from either edge.
        expected = (1 / 16 + (point + 1) / 2 * 7 / 8) * size
        assert (xs.mean() + 0.5, ys.mean() + 0.5) == pytest.approx(tuple(expected), abs=1)
    squares = [find_marks(tile, LATTER).sum() for tile in row.tiles]
    assert squares[0] == 0 and min(squares[1:]) > 0


def test_rows_of_stm_give_the_mix_and_the_divergence_from_uniform(config: Config, cuts: list[Cut]) -> None:
    notes = {}
    for name in ("stm", "released"):
        mask = draw_run_masks(language_run(config, name), weights_of(config, name), cuts)[0]
        rows = [*guide_rows(mask, name), run_mask_row(mask, name)]
        assert [row.kind for row in rows] == ["map", "map", "map", "mask"]
        assert "0.25 x blobs" in rows[2].note and "0.75 x attention" in rows[2].note
        notes[name] = rows[3].note
        scale = rows[0].scale
        assert scale is not None and scale.low < 1 < scale.high  # blobs of sum 1
    assert "drawn by log-probability" in notes["stm"] and ", 0.000 nats from uniform" not in notes["stm"]
    assert "drawn as released, 0.000 nats from uniform" in notes["released"]


def test_each_cluster_has_a_colour_and_one_dot_on_its_kept_token(config: Config, cuts: list[Cut]) -> None:
    mask = draw_run_masks(language_run(config, "clusters"), None, cuts)[0]
    bare = type(mask)(mask.run, Cut(**{**vars(mask.cut), "boxes": None}), mask.teacher, mask.masked, None)
    (row,) = guide_rows(bare, "ClusterSTM")
    size = row.tiles.shape[1] // 8
    features = torch.nn.functional.normalize(mask.teacher.tokens, dim=-1)
    settings = mask.run.cluster
    assert settings is not None and row.note.startswith("10 clusters")  # 64 - int(0.85 * 64)
    labels = cluster_tokens(features, mask.cut.batch["guides"]["noise"], 10, settings).labels[0].numpy()
    for slot in range(4):
        cells = row.tiles[slot].reshape(8, size, 8, size, 3).swapaxes(1, 2).reshape(64, size, size, 3)
        dotted = find_marks(cells, KEPT).any(axis=(1, 2))
        assert (dotted == ~mask.masked[slot].ravel()).all()
        assert sorted(labels[slot][dotted]) == list(range(10))
    grey = np.full((1, 16, 16, 3), 128, np.uint8)
    colored = film_strips.color_groups(grey, np.arange(64).reshape(1, 8, 8))[0, ::2, ::2].reshape(64, 3)
    assert len(np.unique(colored[:30], axis=0)) == 30


# --------------------------------------------------------------------------------------------- figures and the page


def draw_figure(config: Config, run: str) -> list[list[Row]]:
    spec = FigureSpec(title="t", kind="clips", runs={"A run": run}, show=("frames", "guides", "masks"), clips=1)
    return [rows for _, rows in paper_clips._draw_dataset(config, spec, config.name)]


def test_a_figure_shows_guides_over_the_mask(config: Config) -> None:
    (rows,) = draw_figure(config, "stm")
    assert [row.kind for row in rows] == ["frames", "map", "map", "map", "mask"]
    assert {row.label for row in rows[1:]} == {"A run"}
    (rows,) = draw_figure(config, "clusters")  # without weights
    assert [row.kind for row in rows] == ["frames", "map", "mask"]


def test_the_page_shows_every_run_s_own_mask(config: Config) -> None:
    results = collect(config, Layout.of(config))
    rows = draw_clip_strips(config, Layout.of(config), results)[0].rows
    kinds = {name: [row.kind for row in rows if row.label == name] for name in RUNS}
    learned = ["map", "map", "map", "mask"]
    assert kinds == {
        "scratch": [],
        "umt": ["map", "mask"],
        "stm": learned,
        "released": learned,
        "clusters": ["map", "mask"],
    }
    assert results.problems == []


def test_weights_without_a_mask_are_named_and_stop_no_other_mask(config: Config, tmp_path: Path) -> None:
    damaged = config.model_copy(update={"results": str(tmp_path)})
    layout = Layout.of(damaged)
    write_offline(layout, damaged)
    run = damaged.runs["stm"]
    path = layout.pretrain("stm") / "weights.safetensors"
    zoo.save(VideoEncoder(zoo.describe(run)), path, extra={"branch": {"decoder.x": torch.zeros(1)}}, header={})
    results = collect(damaged, layout)
    rows = draw_clip_strips(damaged, layout, results)[0].rows
    (problem,) = results.problems
    assert problem.startswith("mask of stm: WeightsError") and "holds no learned mask" in problem
    # `released` has no weights yet, which is not a problem.
    assert {row.label for row in rows if row.kind == "mask"} == {"umt", "clusters"}
    with pytest.raises(ReportError, match=r"mask of stm.*holds no learned mask.*pretrain again"):
        draw_figure(damaged, "stm")
    with pytest.raises(ReportError, match="run `stm pretrain --run released`"):
        draw_figure(damaged, "released")
    wide = run.model_copy(update={"spatio_temporal": run.spatio_temporal.model_copy(update={"width": 24})})
    write_weights(damaged, "stm")
    with pytest.raises(ReportError, match="weights do not fit"):
        draw_figure(damaged.model_copy(update={"pretrain": {"stm": wide}}), "stm")


def test_guides_of_a_run_without_a_frame_teacher_are_refused(made_results: Config) -> None:
    with pytest.raises(ReportError, match="tube has no `guides` to show"):
        draw_figure(made_results, "tube")
