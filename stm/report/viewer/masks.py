"""The viewer's masks: every strategy on the same clips, for each caption and over a grid of ratios.

All masks come from the strategies themselves (stm/masking, installed packages or a user's file); the page's script only
looks them up.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray

from stm.config import Config, Teacher
from stm.data.crop_boxes import center_crop
from stm.data.guides.window import cut_maps, read_maps
from stm.data.sampling import view_windows
from stm.layout import Layout
from stm.masking import get_strategy, to_boolean
from stm.report.clips.cuts import Cut, compute_guides
from stm.report.clips.gallery import cut_for_all_masks, explain_missing, study_strategies, usual_ratio
from stm.report.results.records import Results
from stm.shards.index import ClipIndex
from stm.shards.reader import ShardReader
from stm.storage.machine_errors import is_machine_error

GRID = tuple(round(step / 20, 2) for step in range(1, 20))  # 0.05 to 0.95
CAPTION_GUIDE = "similarity"
MAX_CLIPS = 4  # on the page
MAX_CAPTIONS = 8  # per clip; benchmarks have up to 20, and each adds to the size of the page

Masks = NDArray[np.bool_]  # [ratios, slots, side, side], True: hidden
Explain = Callable[[Iterable[str]], str]  # from the guides that a strategy needs to the reason why one is missing


@dataclass(frozen=True)
class StrategyMasks:
    """A strategy's masks of all clips of a viewer."""

    strategy: str
    usual: float  # the ratio of the paper that introduced its guide
    ratios: tuple[float, ...]  # ascending
    per_caption: bool
    masks: list[list[Masks]]  # per clip: one array per caption, or a single one if the mask does not depend on it


@dataclass(frozen=True)
class MaskViewer:
    """Clips of one geometry, each with a cut per caption (at least one), and the masks of all strategies."""

    clips: list[list[Cut]]
    strategies: list[StrategyMasks] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)  # strategy -> the reason it is left out


def draw_masks(
    cuts: Sequence[Cut], strategies: Iterable[str], explain: Explain, teacher: Teacher | None = None
) -> MaskViewer:
    """Draw the masks of all strategies on clips of the same geometry.

    Args:
        cuts: one cut per clip.
        strategies: as named in a config, in the order of the viewer's list.
        explain: describes why the guides of a strategy are missing.
        teacher: the model whose attention and features some strategies need.
    """
    viewer = MaskViewer([cut_per_caption(cut) for cut in cuts])
    for strategy in strategies:
        try:
            drawn = _draw_strategy(viewer.clips, strategy, teacher)
        except Exception as error:  # a user's strategy may raise anything and must not stop the others
            if isinstance(error, OSError) and is_machine_error(error):
                raise
            viewer.missing[strategy] = f"{type(error).__name__}: {error}"
            continue
        if drawn is None:
            viewer.missing[strategy] = explain(get_strategy(strategy).needs)
        else:
            viewer.strategies.append(drawn)
    return viewer


def _draw_strategy(clips: Sequence[Sequence[Cut]], strategy: str, teacher: Teacher | None) -> StrategyMasks | None:
    """Draw a strategy's masks; None if a clip lacks one of its guides."""
    per_caption = CAPTION_GUIDE in get_strategy(strategy).needs
    usual = usual_ratio(strategy)
    ratios = tuple(sorted({*GRID, usual}))
    drawn = []
    for cuts in clips:
        masks = [draw_ratios(cut, strategy, ratios, teacher) for cut in (cuts if per_caption else cuts[:1])]
        if any(mask is None for mask in masks):
            return None
        drawn.append([mask for mask in masks if mask is not None])
    return StrategyMasks(strategy, usual, ratios, per_caption, drawn)


def draw_ratios(cut: Cut, strategy: str, ratios: Sequence[float], teacher: Teacher | None) -> Masks | None:
    """Draw a strategy's masks of one cut, bool [ratios, slots, side, side]; None if a guide is missing."""
    draw_mask = get_strategy(strategy)
    guides = compute_guides(cut.batch, draw_mask.needs, teacher)
    if guides is None:
        return None
    shape = cut.geometry
    masks = [to_boolean(draw_mask(guides, ratio), shape.slots, shape.tokens)[0].numpy() for ratio in ratios]
    return np.stack(masks).reshape(len(ratios), shape.slots, shape.side, shape.side)


def cut_per_caption(cut: Cut) -> list[Cut]:
    """Return a copy of a cut for each of the clip's first different captions, with that caption's similarity.

    The copies share everything else, noise included. A clip without packed similarity has one cut, the given one.
    """
    if CAPTION_GUIDE not in cut.batch["guides"]:
        return [cut]
    index = ClipIndex([cut.clip.index])
    clip = next(clip for clip in (index[number] for number in range(len(index))) if clip.key == cut.clip.key)
    shape, reader = cut.geometry, ShardReader()
    window = view_windows(1, shape.frames, shape.stride, clip.frames, shape.sampling)[0]
    cuts = []
    for caption in list(dict.fromkeys(clip.captions))[:MAX_CAPTIONS]:
        maps = read_maps(reader, clip, (CAPTION_GUIDE,), window, shape, clip.captions.index(caption))
        guides = cut_maps(maps, clip, center_crop(clip.width, clip.height), False, shape)
        similarity = torch.from_numpy(guides[CAPTION_GUIDE])[None]
        batch = {**cut.batch, "guides": {**cut.batch["guides"], CAPTION_GUIDE: similarity}}
        cuts.append(replace(cut, batch=batch, caption=caption))
    return cuts


def draw_study_masks(config: Config, layout: Layout, results: Results) -> MaskViewer:
    """Draw all strategies on the first report clips of one dataset, at most `MAX_CLIPS`; `results` collects problems."""
    cuts, teacher = cut_for_all_masks(config, layout, results, MAX_CLIPS)
    return draw_masks(cuts, study_strategies(config) if cuts else [], explain_missing, teacher)
