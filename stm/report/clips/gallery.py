"""The mask gallery: every masking strategy on the same clips, each at its usual ratio."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

from stm.config import Config, Teacher
from stm.config.strategies import StrategyError, find_strategy, strategy_names
from stm.data.geometry import Geometry
from stm.layout import Layout
from stm.methods import TEACHER_GUIDE
from stm.report.clips.cuts import Cut, cut_clips, default_geometry, frames_row, mask_cut, mask_row
from stm.report.clips.draw import ClipStrips
from stm.report.clips.select import ReportClip, choose_clips
from stm.report.results.records import Results
from stm.storage.machine_errors import is_machine_error

MAX_CLIPS = 2

# Keyed by the guide that a strategy needs, in gallery order.
USUAL_RATIO = {
    "": 0.9,  # VideoMAE
    "flow": 0.9,  # MGMAE
    "similarity": 0.6,  # TGM, Figure 3a
    "motion": 0.75,  # MGM, as quoted by TGM
    "motion_compensated": 0.75,
    TEACHER_GUIDE: 0.8,  # UMT
    "features": 0.85,  # ClusterSTM, from a secondary source
    "spatiotemporal": 0.7,  # STM's released code
}


@dataclass
class MaskGallery:
    """A few clips, each with all masks."""

    clips: list[ClipStrips] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)  # strategy -> the reason it is not drawn


def usual_ratio(strategy: str) -> float:
    """Return the mask ratio of the paper that introduced a strategy's guide; 0.75 for user-defined guides."""
    needs = _needs(strategy)
    return USUAL_RATIO.get(needs[0] if needs else "", 0.75)


def ordered_strategies(own: Iterable[str] = ()) -> list[str]:
    """Return all strategies grouped by guide, with unguided strategies first.

    Args:
        own: user-defined strategies, which `strategy_names` does not list.
    """
    order = list(USUAL_RATIO)
    guides = {name: _needs(name) for name in {*strategy_names(), *own}}
    places = {name: [order.index(guide) for guide in needs if guide in order] for name, needs in guides.items()}
    return sorted(places, key=lambda name: (places[name] or [len(order) if guides[name] else 0], name))


def _needs(strategy: str) -> tuple[str, ...]:
    """Return a strategy's guides; empty if its file cannot be loaded, since drawing the mask reports that error."""
    try:
        return find_strategy(strategy).needs
    except StrategyError:
        return ()


def cut_for_all_masks(config: Config, layout: Layout, results: Results, count: int) -> tuple[list[Cut], Teacher | None]:
    """Cut the first report clips of one dataset, at most `count`, for all masks; also return the first run's teacher, if any.

    The geometry is that of the run with the most tokens. Without packed clips, there are no cuts.
    """
    no_clips: list[ReportClip] = []
    choose = partial(choose_clips, config, layout, results.shards, min(count, config.report.clips))
    clips = results.attempt("choice of clips", choose, no_clips)
    if not clips:
        return [], None
    runs = list(config.pretrain.values())
    shapes = [Geometry.of(run) for run in runs]
    # Masks differ most from each other, and from slot to slot, in the geometry with the most tokens.
    finest = max(shapes, key=lambda shape: shape.slots * shape.tokens, default=None)
    geometry = default_geometry(config, clips) if finest is None else finest
    no_cuts: list[Cut] = []
    cuts = results.attempt("clips under all masks", partial(cut_clips, clips, geometry, config.seed), no_cuts)
    return cuts, next((run.teacher for run in runs if run.teacher is not None), None)


def study_strategies(config: Config) -> list[str]:
    """Return all strategies, including those that only the config's runs name, in gallery order."""
    return ordered_strategies(mask.strategy for run in config.pretrain.values() for mask in run.masks)


def draw_mask_gallery(config: Config, layout: Layout, results: Results) -> MaskGallery:
    """Draw all strategies on the first report clips of one dataset, using the teacher of the first run that has one."""
    cuts, teacher = cut_for_all_masks(config, layout, results, MAX_CLIPS)
    if not cuts:
        return MaskGallery()
    gallery = MaskGallery([ClipStrips(cut.clip, cut.caption, [frames_row(cut)]) for cut in cuts])
    for strategy in study_strategies(config):
        draw = partial(_draw, strategy, cuts, teacher, gallery)
        try:
            results.attempt(f"mask {strategy}", draw, None)
        except Exception as error:  # a user's strategy may raise anything and must not stop the others
            if isinstance(error, OSError) and is_machine_error(error):
                raise
            results.problems.append(f"mask {strategy}: {type(error).__name__}: {error}")
    return gallery


def _draw(strategy: str, cuts: Sequence[Cut], teacher: Teacher | None, gallery: MaskGallery) -> None:
    """Add a strategy's mask to the gallery's clips, or the reason why it is missing."""
    ratio = usual_ratio(strategy)
    gallery.missing[strategy] = "it could not be drawn"  # remains if drawing a mask raises an error
    masks = [mask_cut(cut, strategy, ratio, teacher) for cut in cuts]
    for cut, clip, masked in zip(cuts, gallery.clips, masks, strict=True):
        if masked is not None:
            clip.rows.append(mask_row(cut, f"{strategy} {ratio:g}", masked, ratio=ratio))
    if any(masked is None for masked in masks):
        gallery.missing[strategy] = explain_missing(_needs(strategy))
    else:
        del gallery.missing[strategy]


def explain_missing(needs: Iterable[str]) -> str:
    """Describe why a study has not all guides that a strategy needs."""
    if "spatiotemporal" in needs:
        return "learned by runs of the method stm and shown with their clips"
    if {TEACHER_GUIDE, "features"} & set(needs):
        return "no run has a teacher"
    # `motion_compensated` is computed from the packed motion.
    return f"no {' and no '.join(need.replace('_compensated', '') for need in needs)} maps are packed"
