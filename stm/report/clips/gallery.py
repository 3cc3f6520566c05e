"""Every masking strategy on the same clips, each at its usual ratio."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

from stm.config import Config, Teacher
from stm.config.strategies import StrategyError, find_strategy, strategy_names
from stm.data.geometry import Geometry
from stm.layout import Layout
from stm.methods import TEACHER_GUIDE
from stm.report.clips.cuts import Cut, cut_clips, default_geometry, frames_row, mask_cut, mask_row
from stm.report.clips.draw import ClipPicture
from stm.report.clips.select import Chosen, choose_clips
from stm.report.results.records import Results

MOST_CLIPS = 2

# By the guide that a strategy needs: VideoMAE's and MGMAE's ratio, TGM's (Table 6), MGM's as TGM quotes it, UMT's.
USUAL_RATIO = {"": 0.9, "flow": 0.9, "similarity": 0.6, "motion": 0.75, "motion_compensated": 0.75, TEACHER_GUIDE: 0.8}
USUAL_RATIO |= {"features": 0.85, "spatiotemporal": 0.7}  # ClusterSTM's, told at second hand; STM's release


@dataclass
class MaskGallery:
    """All masks on some clips."""

    clips: list[ClipPicture] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)  # strategy -> why it is not drawn


def usual_ratio(strategy: str) -> float:
    """The ratio that a strategy's paper uses; 0.75 for those that need guides which no paper has."""
    needs = _needs(strategy)
    return USUAL_RATIO.get(needs[0] if needs else "", 0.75)


def ordered_strategies(own: Iterable[str] = ()) -> list[str]:
    """All strategies, those of one guide side by side: first those without any.

    Args:
        own: strategies of the user's own files, which no list names.
    """
    order, needs = list(USUAL_RATIO), {name: _needs(name) for name in {*strategy_names(), *own}}
    places = {name: [order.index(need) for need in found if need in order] for name, found in needs.items()}
    return sorted(places, key=lambda name: (places[name] or [len(order) if needs[name] else 0], name))


def _needs(strategy: str) -> tuple[str, ...]:
    """Nothing where its source cannot be read: drawing it says why."""
    try:
        return find_strategy(strategy).needs
    except StrategyError:
        return ()


def picture_masks(config: Config, layout: Layout, results: Results) -> MaskGallery:
    """All strategies on the first clips of the report; of one dataset, whose config this is.

    The clips are cut as those of the run with most tokens are. The teacher is that of the first run that has one.
    """
    wanted = config.report.model_copy(update={"clips": min(MOST_CLIPS, config.report.clips)})
    fewer = config.model_copy(update={"report": wanted})
    nothing: list[Chosen] = []
    chosen = results.attempt("choice of clips", partial(choose_clips, fewer, layout, results), nothing)
    if not chosen:
        return MaskGallery()
    runs = list(config.pretrain.values())
    shapes = [Geometry.of(run) for run in runs]
    # The shape with most tokens, where masks differ most from one another and from slot to slot.
    finest = max(shapes, key=lambda shape: shape.slots * shape.tokens, default=None)
    geometry = default_geometry(config, chosen) if finest is None else finest
    none: list[Cut] = []
    cuts = results.attempt("clips under all masks", partial(cut_clips, chosen, geometry, config.seed), none)
    teacher = next((run.teacher for run in runs if run.teacher is not None), None)
    gallery = MaskGallery([ClipPicture(cut.clip, cut.caption, [frames_row(cut)]) for cut in cuts])
    for strategy in ordered_strategies(mask.strategy for run in runs for mask in run.masks):
        draw = partial(_draw, strategy, cuts, teacher, gallery)
        try:
            results.attempt(f"mask {strategy}", draw, None)
        except Exception as error:  # a strategy of the user's may raise anything, and must not take the others along
            results.problems.append(f"mask {strategy}: {type(error).__name__}: {error}")
    return gallery


def _draw(strategy: str, cuts: Sequence[Cut], teacher: Teacher | None, gallery: MaskGallery) -> None:
    ratio = usual_ratio(strategy)
    gallery.missing[strategy] = "it could not be drawn"
    drawn = [mask_cut(cut, strategy, ratio, teacher) for cut in cuts]
    for cut, picture, masked in zip(cuts, gallery.clips, drawn, strict=True):
        if masked is not None:
            picture.rows.append(mask_row(cut, f"{strategy} {ratio:g}", masked, ratio=ratio))
    if any(masked is None for masked in drawn):
        gallery.missing[strategy] = _explain(_needs(strategy))
    else:
        del gallery.missing[strategy]


def _explain(needs: Iterable[str]) -> str:
    if "spatiotemporal" in needs:
        return "it is learned by a run of the method stm, and stands with that run's clips"
    if {TEACHER_GUIDE, "features"} & set(needs):
        return "no run has a teacher"
    return f"no {' and no '.join(need.replace('_compensated', '') for need in needs)} maps are packed"
