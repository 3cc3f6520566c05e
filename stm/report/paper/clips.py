"""Config figures of kind `clips`: frames, similarity, and the masks, reconstructions and attention of runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from stm.config import CaptionChoice, Config, FigureSpec, LanguageRun, PretrainRun
from stm.data.geometry import Geometry
from stm.evaluation.results import load_checked_encoder
from stm.layout import Layout
from stm.models.attention import attention_from, centre_token
from stm.models.vit import VideoEncoder
from stm.report.clips import film_strips
from stm.report.clips.cuts import Cut, cut_clips, frames_row, map_row, mask_cut, mask_row
from stm.report.clips.draw import MAPS, describe_clip, reconstruct
from stm.report.clips.film_strips import Row, Scale
from stm.report.clips.run_masks import RunMask, draw_run_masks, draws_own_mask, guide_rows, learns_mask, run_mask_row
from stm.report.clips.select import choose_clips
from stm.report.results.collect import find_shards
from stm.report.results.evaluations import ReportError
from stm.report.results.records import Run

CutKey = tuple[Geometry, CaptionChoice]


@dataclass(frozen=True)
class FigureRun:
    """The first instance of a run in the figure, with its clips."""

    label: str
    instance: str
    settings: PretrainRun | LanguageRun
    weights: Path
    cuts: Sequence[Cut]

    @property
    def key(self) -> CutKey:
        return cut_key(self.settings)


def cut_key(run: PretrainRun | LanguageRun) -> CutKey:
    """Return the geometry and the captions to sample from; runs with equal keys share cuts."""
    return Geometry.of(run), run.captions


def draw_clips(config: Config, name: str) -> Figure:
    """Draw the clips of the figure `name`, one dataset after the other if its runs train on several.

    Raises:
        ReportError: there are no packed clips, or an item to show is missing.
    """
    spec = config.figures[name]
    blocks: list[tuple[str, list[Row]]] = []
    datasets = list(dict.fromkeys(config.dataset_of(config.instances(run)[0]) for run in spec.runs.values()))
    for dataset in datasets:
        prefix = f"{dataset}:   " if len(datasets) > 1 else ""
        blocks += [(prefix + heading, rows) for heading, rows in _draw_dataset(config, spec, dataset)]
    return film_strips.compose(blocks, spec.title)


def _draw_dataset(config: Config, spec: FigureSpec, dataset: str) -> list[tuple[str, list[Row]]]:
    """Return the heading and rows of each clip."""
    layout = Layout.of(config, dataset)
    clips = choose_clips(config.of(dataset), layout, find_shards(layout), spec.clips)
    if not clips:
        raise ReportError(f"there are no packed clips in {layout.root / 'shards'}; run the workflow")
    cuts: dict[CutKey, list[Cut]] = {}
    runs = []
    for label, name in spec.runs.items():
        instance = config.instances(name)[0]
        if config.dataset_of(instance) == dataset:
            settings = config.runs[instance]
            key = cut_key(settings)
            if key not in cuts:
                cuts[key] = cut_clips(clips, key[0], config.seed, key[1])
            weights = layout.pretrain(instance) / "weights.safetensors"
            runs.append(FigureRun(label, instance, settings, weights, cuts[key]))
    rows = [_common_rows(spec, list(cuts.values()), position) for position in range(len(clips))]
    for run in runs:
        for clip_rows, run_rows in zip(rows, _run_rows(spec, run), strict=True):
            clip_rows += run_rows
    first = next(iter(cuts.values()))
    return [(describe_clip(cut.clip, cut.caption), clip_rows) for cut, clip_rows in zip(first, rows, strict=True)]


def _common_rows(spec: FigureSpec, groups: Sequence[Sequence[Cut]], position: int) -> list[Row]:
    """Build the rows that runs share: the frames of each geometry and the similarity of each caption."""
    shapes: dict[Geometry, Cut] = {}
    captions: dict[tuple[Geometry, str], Cut] = {}
    for group in groups:
        cut = group[position]
        shapes.setdefault(cut.geometry, cut)
        captions.setdefault((cut.geometry, cut.caption), cut)
    rows = [frames_row(cut) for cut in shapes.values()] if "frames" in spec.show else []
    for cut in captions.values() if "similarity" in spec.show else []:
        row = map_row(cut, "similarity", *MAPS["similarity"], f"“{cut.caption}”" if len(captions) > 1 else "")
        if row is None:
            raise ReportError(f"{cut.clip.index} has no similarity of {cut.clip.key!r}; pack it (config: pack)")
        rows.append(row)
    return rows


def _run_rows(spec: FigureSpec, run: FigureRun) -> list[list[Row]]:
    """Build the rows of a run, per clip, in the order of `show`."""
    draw = {"guides": _guides, "masks": _masks, "reconstructions": _reconstructions, "attention": _attention}
    kinds = [draw[what](run) for what in spec.show if what in draw]
    return [list(chain(*rows)) for rows in zip(*kinds, strict=True)] if kinds else [[] for _ in run.cuts]


def _guides(run: FigureRun) -> list[list[Row]]:
    """Build the rows of the mask's guides, for a run with a frame teacher."""
    if not draws_own_mask(run.settings):
        raise ReportError(
            f"{run.instance} has no `guides` to show: only runs of umt, stm and clusterstm make their mask from a "
            "frame teacher"
        )
    return [guide_rows(mask, run.label) for mask in _own_masks(run)]


def _own_masks(run: FigureRun) -> list[RunMask]:
    assert draws_own_mask(run.settings)
    weights = _find_weights(run) if learns_mask(run.settings) else None
    try:
        return draw_run_masks(run.settings, weights, run.cuts)
    except ValueError as error:
        raise ReportError(f"mask of {run.instance}: {error}") from error


def _masks(run: FigureRun) -> list[list[Row]]:
    if draws_own_mask(run.settings):
        return [[run_mask_row(mask, run.label)] for mask in _own_masks(run)]
    mask = run.settings.mask
    rows = []
    for cut in run.cuts:
        masked = mask_cut(cut, mask.strategy, mask.ratio, run.settings.teacher)
        if masked is None:
            raise ReportError(
                f"{cut.clip.index} lacks a guide that the mask {mask.strategy} of {run.instance} needs; pack it "
                "(config: pack)"
            )
        rows.append([mask_row(cut, run.label, masked, f"{mask.strategy} {mask.ratio:g}", ratio=mask.ratio)])
    return rows


def _reconstructions(run: FigureRun) -> list[list[Row]]:
    settings = run.settings
    try:
        tiles_per_cut = reconstruct(Run(run.instance, settings, [], [], _find_weights(run), {}), run.cuts)
    except RuntimeError as error:  # raised by torch for weights that do not fit the config
        raise ReportError(f"{run.weights} does not fit the run {run.instance}; pretrain again: {error}") from error
    note = "reconstruction" if settings.reconstructs else "decoder untrained: contrast only"
    note = "untrained" if settings.optimisation.epochs == 0 else note
    return [[Row("reconstruction", run.label, tiles, note)] for tiles in tiles_per_cut]


def _attention(run: FigureRun) -> list[list[Row]]:
    """Attention from the centre patch in the encoder's last block, with all tokens visible (TGM, section 4.7)."""
    encoder = _load_encoder(run)
    untrained = "" if run.settings.trains_encoder else ", untrained"
    rows = []
    for cut in run.cuts:
        attention = attention_from(encoder, cut.batch["video"])
        grid = cut.token_grid(attention * attention.shape[1])
        # A few tokens, often the query itself, get so much attention that on a full scale all others would look alike.
        scale = Scale(float(grid.min()), float(np.percentile(grid, 99)), "times the mean")
        tiles = mark_query(film_strips.heat_map(cut.frames, grid, scale), cut, centre_token(encoder.architecture))
        rows.append([Row("attention", run.label, tiles, f"attention of the red patch{untrained}", scale)])
    return rows


def _load_encoder(run: FigureRun) -> VideoEncoder:
    try:
        return load_checked_encoder(_find_weights(run), run.settings).eval()
    except ValueError as error:
        raise ReportError(str(error)) from error


def mark_query(tiles: film_strips.Tiles, cut: Cut, token: int) -> film_strips.Tiles:
    """Outline the query token in all shown frames of its slot."""
    shape = cut.geometry
    slot, place = divmod(token, shape.tokens)
    row, column = divmod(place, shape.side)
    for position, shown_slot in enumerate(cut.slots):
        if shown_slot == slot:
            tiles = film_strips.mark_token(tiles, position, row, column, shape.side)
    return tiles


def _find_weights(run: FigureRun) -> Path:
    if not run.weights.exists():
        raise ReportError(
            f"{run.weights} is missing; run `stm pretrain --run {run.instance}` with the same --config, or the workflow"
        )
    return run.weights
