"""Figures of clips as a paper has them: frames, similarity, and what each run hides, paints and looks at."""

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
from stm.report.clips.select import Chosen, choose_clips
from stm.report.results.collect import find_shards
from stm.report.results.evaluations import ReportError
from stm.report.results.records import Results, Run

CutKey = tuple[Geometry, CaptionChoice]


@dataclass(frozen=True)
class Shown:
    """A run of the figure: the first of its instances, with its clips."""

    label: str
    instance: str
    settings: PretrainRun | LanguageRun
    weights: Path
    cuts: Sequence[Cut]

    @property
    def key(self) -> CutKey:
        return cut_key(self.settings)


def cut_key(run: PretrainRun | LanguageRun) -> CutKey:
    """What decides how a run's clips are cut, and which caption is theirs."""
    return Geometry.of(run), run.captions


def draw_clips(config: Config, name: str) -> Figure:
    """The clips of the figure `name`, one under the other; of runs on several datasets, each dataset's in turn.

    Raises:
        ReportError: there are no packed clips, or something that shall be shown is missing.
    """
    spec = config.figures[name]
    blocks: list[tuple[str, list[Row]]] = []
    datasets = list(dict.fromkeys(config.dataset_of(config.instances(run)[0]) for run in spec.runs.values()))
    for dataset in datasets:
        prefix = f"{dataset}:   " if len(datasets) > 1 else ""
        blocks += [(prefix + heading, rows) for heading, rows in _draw_dataset(config, spec, dataset)]
    return film_strips.compose_all(blocks, spec.title)


def _draw_dataset(config: Config, spec: FigureSpec, dataset: str) -> list[tuple[str, list[Row]]]:
    chosen = _choose(config, dataset, spec.clips)
    cuts: dict[CutKey, list[Cut]] = {}
    runs = []
    for label, run in spec.runs.items():
        instance = config.instances(run)[0]
        if config.dataset_of(instance) == dataset:
            settings = config.runs[instance]
            key = cut_key(settings)
            if key not in cuts:
                cuts[key] = cut_clips(chosen, key[0], config.seed, key[1])
            weights = Layout.of(config, dataset).pretrain(instance) / "weights.safetensors"
            runs.append(Shown(label, instance, settings, weights, cuts[key]))
    rows = [_common_rows(spec, list(cuts.values()), position) for position in range(len(chosen))]
    for shown in runs:
        for found, more in zip(rows, _run_rows(spec, shown), strict=True):
            found += more
    first = next(iter(cuts.values()))
    return [(describe_clip(cut.clip, cut.caption), found) for cut, found in zip(first, rows, strict=True)]


def _choose(config: Config, dataset: str, clips: int) -> list[Chosen]:
    corpus, layout = config.of(dataset), Layout.of(config, dataset)
    corpus = corpus.model_copy(update={"report": config.report.model_copy(update={"clips": clips})})
    chosen = choose_clips(corpus, layout, Results(shards=find_shards(layout)))
    if not chosen:
        raise ReportError(f"there are no packed clips in {layout.root / 'shards'}; run the workflow")
    return chosen


def _common_rows(spec: FigureSpec, groups: Sequence[Sequence[Cut]], position: int) -> list[Row]:
    """Frames of each geometry, and similarity of each caption, that the runs see of a clip."""
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


def _run_rows(spec: FigureSpec, shown: Shown) -> list[list[Row]]:
    """For each clip the rows of a run, in the order of `show`."""
    draw = {"guides": _guides, "masks": _masks, "reconstructions": _reconstructions, "attention": _attention}
    kinds = [draw[what](shown) for what in spec.show if what in draw]
    return [list(chain(*rows)) for rows in zip(*kinds, strict=True)] if kinds else [[] for _ in shown.cuts]


def _guides(shown: Shown) -> list[list[Row]]:
    """What the masks are made from, of runs with a teacher of frames."""
    if not draws_own_mask(shown.settings):
        raise ReportError(
            f"{shown.instance} has no `guides` to show: its mask is not made from a teacher of umt, stm or clusterstm"
        )
    return [guide_rows(found, shown.label) for found in _own_masks(shown)]


def _own_masks(shown: Shown) -> list[RunMask]:
    assert draws_own_mask(shown.settings)
    weights = _find_weights(shown) if learns_mask(shown.settings) else None
    try:
        return draw_run_masks(shown.settings, weights, shown.cuts)
    except ValueError as error:
        raise ReportError(f"mask of {shown.instance}: {error}") from error


def _masks(shown: Shown) -> list[list[Row]]:
    if draws_own_mask(shown.settings):
        return [[run_mask_row(found, shown.label)] for found in _own_masks(shown)]
    mask, rows = shown.settings.mask, list[list[Row]]()
    for cut in shown.cuts:
        masked = mask_cut(cut, mask.strategy, mask.ratio, shown.settings.teacher)
        if masked is None:
            raise ReportError(
                f"{cut.clip.index} lacks what the mask {mask.strategy} of {shown.instance} needs; pack it (config: pack)"
            )
        rows.append([mask_row(cut, shown.label, masked, f"{mask.strategy} {mask.ratio:g}", ratio=mask.ratio)])
    return rows


def _reconstructions(shown: Shown) -> list[list[Row]]:
    settings = shown.settings
    try:
        painted = reconstruct(Run(shown.instance, settings, [], [], _find_weights(shown), {}), shown.cuts)
    except RuntimeError as error:  # torch: weights that do not fit the config
        raise ReportError(f"{shown.weights} does not fit the run {shown.instance}; pretrain again: {error}") from error
    note = "reconstruction" if settings.reconstructs else "decoder untrained: contrast only"
    note = "untrained" if settings.optimisation.epochs == 0 else note
    return [[Row("reconstruction", shown.label, tiles, note)] for tiles in painted]


def _attention(shown: Shown) -> list[list[Row]]:
    """Attention of the encoder's last block, which sees all tokens, from the centre patch (TGM, section 4.7)."""
    encoder = _load_encoder(shown)
    untrained = ", untrained" if shown.settings.optimisation.epochs == 0 else ""
    rows = []
    for cut in shown.cuts:
        spread = attention_from(encoder, cut.batch["video"])
        cells = cut.cells(spread * spread.shape[1])
        # A few tokens, often the asking one itself, get so much that all others would look alike.
        scale = Scale(float(cells.min()), float(np.percentile(cells, 99)), "times the mean")
        tiles = mark_query(film_strips.heat(cut.frames, cells, scale), cut, centre_token(encoder.architecture))
        rows.append([Row("attention", shown.label, tiles, f"attention of the red patch{untrained}", scale)])
    return rows


def _load_encoder(shown: Shown) -> VideoEncoder:
    try:
        return load_checked_encoder(_find_weights(shown), shown.settings).eval()
    except ValueError as error:
        raise ReportError(str(error)) from error


def mark_query(tiles: film_strips.Tiles, cut: Cut, token: int) -> film_strips.Tiles:
    """Frames the token that asks, in all shown frames of its slot."""
    shape = cut.geometry
    slot, place = divmod(token, shape.tokens)
    row, column = divmod(place, shape.side)
    for shown in (number for number, found in enumerate(cut.slots) if found == slot):
        tiles = film_strips.mark_cell(tiles, shown, row, column, shape.side)
    return tiles


def _find_weights(shown: Shown) -> Path:
    if not shown.weights.exists():
        raise ReportError(f"{shown.weights} is missing; run `stm pretrain --run {shown.instance}`, or the workflow")
    return shown.weights
