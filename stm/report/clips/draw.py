"""Pictures of single clips: frames, maps, every mask and reconstructions, over the slots of a training clip."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from stm.config import CaptionChoice, Config, Section, Teacher
from stm.data.geometry import Geometry
from stm.layout import Layout
from stm.methods import load_method
from stm.report.clips import film_strips
from stm.report.clips.cuts import Cut, cut_clips, default_geometry, frames_row, map_row, mask_cut, mask_row, show_video
from stm.report.clips.film_strips import Row
from stm.report.clips.run_masks import RunMask, draw_run_masks, draws_own_mask, guide_rows, learns_mask, run_mask_row
from stm.report.clips.select import Chosen, choose_clips
from stm.report.results.records import Results, Run, RunGroup, group_runs

MOST_RUNS = 8  # whose reconstructions are shown
MAPS = {"similarity": ("Text similarity", "cosine"), "motion": ("Motion", "cells per stored frame")}

MaskKey = tuple[str, float, Teacher | None, Section | str | None]
Painted = Mapping[int, film_strips.Tiles]  # by the number of the run


@dataclass(frozen=True)
class ClipPicture:
    """One clip, ready to be shown."""

    clip: Chosen
    caption: str  # the one that the similarity is of
    rows: list[Row]

    @property
    def heading(self) -> str:
        return describe_clip(self.clip, self.caption)


def describe_clip(clip: Chosen, caption: str) -> str:
    """Video, label and caption in a line."""
    return "   ".join(filter(None, (clip.video_id, clip.label, f"“{caption}”" if caption else "")))


def picture_clips(
    config: Config, layout: Layout, results: Results, groups: Sequence[RunGroup] | None = None
) -> list[ClipPicture]:
    """Up to `config.report.clips` clips; fewer, or none, when there are no packed shards.

    Args:
        config: of one dataset.
        groups: the runs that train on it, the first instance of each is shown; those of `config` when not given.
    """
    runs = group_runs(config, results.runs) if groups is None else groups
    nothing: list[Chosen] = []
    chosen = results.attempt("choice of clips", partial(choose_clips, config, layout, results), nothing)
    rows: dict[str, list[Row]] = {clip.key: [] for clip in chosen}
    captions: dict[str, str] = {}
    painters = set(painted_runs(runs))
    for geometry, alike in _by_geometry(config, runs, chosen).items():
        shown: set[tuple[str, str]] = set()  # (clip, caption) whose maps have been drawn
        for choice, fellows in _by_captions(alike).items():
            none: list[Cut] = []
            cut = partial(cut_clips, chosen, geometry, config.seed, choice)
            cuts = results.attempt("frames of clips", cut, none)
            masked = _own_masks(fellows, cuts, results)
            painted = {g.number: _attempt(g, cuts, results) for g in fellows if g.number in painters}
            for position, cut_out in enumerate(cuts):
                made = {number: tiles[position] for number, tiles in painted.items() if tiles}
                own = {key: found[position] for key, found in masked.items() if found}
                more = _run_rows(cut_out, fellows, own, made, results)
                rows[cut_out.clip.key] += [*_common_rows(cut_out, shown), *more]
                captions.setdefault(cut_out.clip.key, cut_out.caption)
    return [ClipPicture(clip, captions[clip.key], rows[clip.key]) for clip in chosen if rows[clip.key]]


def painted_runs(groups: Sequence[RunGroup]) -> list[int]:
    """Numbers of the runs whose reconstructions are shown: the first that have weights and a trained decoder."""
    able = [g.number for g in groups if g.instances[0].weights is not None and g.settings.reconstructs]
    return able[:MOST_RUNS]


def _by_geometry(
    config: Config, groups: Sequence[RunGroup], chosen: Sequence[Chosen]
) -> dict[Geometry, list[RunGroup]]:
    """The runs by the shape of their clips; without runs, one shape that suits the stored frames."""
    found: dict[Geometry, list[RunGroup]] = {}
    for group in groups:
        found.setdefault(Geometry.of(group.settings), []).append(group)
    return found or ({default_geometry(config, chosen): []} if chosen else {})


def _by_captions(groups: Sequence[RunGroup]) -> dict[CaptionChoice, list[RunGroup]]:
    """The runs by the captions that they draw from."""
    found: dict[CaptionChoice, list[RunGroup]] = {}
    for group in groups:
        found.setdefault(group.settings.captions, []).append(group)
    return found or {CaptionChoice(): []}


def _common_rows(cut: Cut, shown: set[tuple[str, str]]) -> list[Row]:
    """Frames and maps; of a further caption only what depends on it."""
    first = not any(key == cut.clip.key for key, _ in shown)
    again = (cut.clip.key, cut.caption) in shown
    shown.add((cut.clip.key, cut.caption))
    rows: list[Row | None] = [frames_row(cut)] if first else []
    for guide, (label, unit) in MAPS.items():
        if first:
            rows.append(map_row(cut, guide, label, unit))
        elif guide == "similarity" and not again:
            rows.append(map_row(cut, guide, label, unit, f"“{cut.caption}”"))
    return [row for row in rows if row is not None]


def _run_rows(
    cut: Cut, groups: Sequence[RunGroup], own: Mapping[MaskKey, RunMask], painted: Painted, results: Results
) -> list[Row]:
    """Each mask once, under what it is made from, and under it the reconstructions of the runs that were trained with it."""
    rows: list[Row] = []
    for key, group in _by_mask(groups).items():
        nothing: list[Row] = []
        if not draws_own_mask(group.settings):
            rows += results.attempt(f"mask {key[0]}", partial(_mask_rows, cut, group), nothing)
        elif key in own:
            number = group.number if learns_mask(group.settings) else None
            rows += guide_rows(own[key], group.name, number)
            rows += [run_mask_row(own[key], group.name, number)]
        for fellow in groups:
            if mask_key(fellow) == key and fellow.number in painted:
                untrained = fellow.settings.optimisation.epochs == 0
                note = "untrained" if untrained else "reconstruction"
                rows.append(Row("reconstruction", fellow.name, painted[fellow.number], note, run=fellow.number))
    return rows


def _by_mask(groups: Sequence[RunGroup]) -> dict[MaskKey, RunGroup]:
    """The first run of each mask, one that trains with it where there is one."""
    found: dict[MaskKey, RunGroup] = {}
    for group in sorted(groups, key=lambda group: group.settings.optimisation.epochs == 0):
        found.setdefault(mask_key(group), group)
    return found


def mask_key(group: RunGroup) -> MaskKey:
    """Runs with the same have the same mask on the same clip; a learned one is each run's own."""
    settings = group.settings
    own = group.name if learns_mask(settings) else settings.mask_settings
    return (*group.mask, settings.teacher, own)


def _own_masks(groups: Sequence[RunGroup], cuts: Sequence[Cut], results: Results) -> dict[MaskKey, list[RunMask]]:
    """The masks of the runs with a teacher of frames, one a cut; learned ones only of runs with weights."""
    found: dict[MaskKey, list[RunMask]] = {}
    for key, group in _by_mask(groups).items():
        run, none = group.instances[0], list[RunMask]()
        settings, there = run.settings, run.weights is not None or not learns_mask(run.settings)
        if there and draws_own_mask(settings):
            draw = partial(draw_run_masks, settings, run.weights, cuts)
            found[key] = results.attempt(f"mask of {run.name}", draw, none)
    return found


def _mask_rows(cut: Cut, group: RunGroup) -> list[Row]:
    strategy, ratio = group.mask
    masked = mask_cut(cut, strategy, ratio, group.settings.teacher)
    return [] if masked is None else [mask_row(cut, f"{strategy} {ratio:g}", masked, ratio=ratio)]


def _attempt(group: RunGroup, cuts: Sequence[Cut], results: Results) -> list[film_strips.Tiles]:
    none: list[film_strips.Tiles] = []
    run = group.instances[0]
    try:
        return results.attempt(f"reconstructions of {run.name}", partial(reconstruct, run, cuts), none)
    except RuntimeError as error:  # torch: weights that do not fit the config
        results.problems.append(f"reconstructions of {run.name}: {error}")
        return none


def reconstruct(run: Run, cuts: Sequence[Cut]) -> list[film_strips.Tiles]:
    """Each cut as a run's model paints it: tiles like the frames'. On the CPU, so that the bytes are the same anywhere."""
    assert run.weights is not None
    method = load_method(run.settings, run.weights)
    tiles = []
    for cut in cuts:
        video = method.reconstruct(cut.batch)["video"]
        tiles.append(show_video((video * 255).round().to(torch.uint8), cut.moments))
    return tiles
