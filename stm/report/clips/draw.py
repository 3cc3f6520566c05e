"""The page's film strips: frames, guides, all masks and reconstructions, over the time slots of a training clip."""

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
from stm.report.clips.select import ReportClip, choose_clips
from stm.report.results.records import Results, Run, RunGroup, group_runs

MAX_RECONSTRUCTED_RUNS = 8
MAPS = {"similarity": ("Text similarity", "cosine"), "motion": ("Motion", "cells per stored frame")}

MaskKey = tuple[str, float, Teacher | None, Section | str | None]
Reconstructions = Mapping[int, film_strips.Tiles]  # by run index


@dataclass(frozen=True)
class ClipStrips:
    """One clip with all its rows."""

    clip: ReportClip
    caption: str  # the one whose similarity is shown
    rows: list[Row]

    @property
    def heading(self) -> str:
        return describe_clip(self.clip, self.caption)


def describe_clip(clip: ReportClip, caption: str) -> str:
    """Describe a clip by its video, label and caption in one line."""
    return "   ".join(filter(None, (clip.video_id, clip.label, f"“{caption}”" if caption else "")))


def draw_clip_strips(
    config: Config, layout: Layout, results: Results, groups: Sequence[RunGroup] | None = None
) -> list[ClipStrips]:
    """Draw up to `config.report.clips` clips; fewer or none if too few are packed.

    Args:
        config: the config of one dataset.
        layout: the layout of the dataset.
        results: the results of the dataset; collects problems.
        groups: the runs that train on it, each represented by its first instance; the runs of `config` by default.
    """
    runs = group_runs(config, results.runs) if groups is None else groups
    no_clips: list[ReportClip] = []
    no_cuts: list[Cut] = []
    clips = results.attempt("choice of clips", partial(choose_clips, config, layout, results.shards), no_clips)
    if not clips:
        return []  # without loading weights or teachers
    rows: dict[str, list[Row]] = {clip.key: [] for clip in clips}
    captions: dict[str, str] = {}
    numbers = set(reconstructed_runs(runs))
    for geometry, same_geometry in _by_geometry(config, runs, clips).items():
        drawn_maps: set[tuple[str, str]] = set()  # (clip, caption)
        for choice, members in _by_captions(same_geometry).items():
            cut = partial(cut_clips, clips, geometry, config.seed, choice)
            cuts = results.attempt("frames of clips", cut, no_cuts)
            masks = _own_masks(members, cuts, results)
            tiles = {g.number: _try_reconstruct(g, cuts, results) for g in members if g.number in numbers}
            for position, clip_cut in enumerate(cuts):
                reconstructions = {number: per_cut[position] for number, per_cut in tiles.items() if per_cut}
                own_masks = {key: per_cut[position] for key, per_cut in masks.items() if per_cut}
                rows[clip_cut.clip.key] += _common_rows(clip_cut, drawn_maps)
                rows[clip_cut.clip.key] += _run_rows(clip_cut, members, own_masks, reconstructions, results)
                captions.setdefault(clip_cut.clip.key, clip_cut.caption)
    return [ClipStrips(clip, captions[clip.key], rows[clip.key]) for clip in clips if rows[clip.key]]


def reconstructed_runs(groups: Sequence[RunGroup]) -> list[int]:
    """Indices of the runs whose reconstructions are shown: the first ones with weights and a trained decoder."""
    able = [g.number for g in groups if g.instances[0].weights is not None and g.settings.reconstructs]
    return able[:MAX_RECONSTRUCTED_RUNS]


def _by_geometry(
    config: Config, groups: Sequence[RunGroup], clips: Sequence[ReportClip]
) -> dict[Geometry, list[RunGroup]]:
    """Group the runs by the geometry of their clips; without runs, return one geometry that fits the stored frames."""
    by_geometry: dict[Geometry, list[RunGroup]] = {}
    for group in groups:
        by_geometry.setdefault(Geometry.of(group.settings), []).append(group)
    return by_geometry or ({default_geometry(config, clips): []} if clips else {})


def _by_captions(groups: Sequence[RunGroup]) -> dict[CaptionChoice, list[RunGroup]]:
    """Group the runs by the captions that they sample from."""
    by_captions: dict[CaptionChoice, list[RunGroup]] = {}
    for group in groups:
        by_captions.setdefault(group.settings.captions, []).append(group)
    return by_captions or {CaptionChoice(): []}


def _common_rows(cut: Cut, drawn_maps: set[tuple[str, str]]) -> list[Row]:
    """Build the frame and map rows of a clip; for additional captions, only the caption-dependent similarity."""
    first = not any(key == cut.clip.key for key, _ in drawn_maps)
    again = (cut.clip.key, cut.caption) in drawn_maps
    drawn_maps.add((cut.clip.key, cut.caption))
    rows: list[Row | None] = [frames_row(cut)] if first else []
    for guide, (label, unit) in MAPS.items():
        if first:
            rows.append(map_row(cut, guide, label, unit))
        elif guide == "similarity" and not again:
            rows.append(map_row(cut, guide, label, unit, f"“{cut.caption}”"))
    return [row for row in rows if row is not None]


def _run_rows(
    cut: Cut,
    groups: Sequence[RunGroup],
    own_masks: Mapping[MaskKey, RunMask],
    reconstructions: Reconstructions,
    results: Results,
) -> list[Row]:
    """Build the rows of each mask once, between the guides it is computed from and the reconstructions that use it."""
    rows: list[Row] = []
    for key, group in _by_mask(groups).items():
        no_rows: list[Row] = []
        if not draws_own_mask(group.settings):
            rows += results.attempt(f"mask {key[0]}", partial(_mask_rows, cut, group), no_rows)
        elif key in own_masks:
            number = group.number if learns_mask(group.settings) else None
            rows += guide_rows(own_masks[key], group.name, number)
            rows += [run_mask_row(own_masks[key], group.name, number)]
        for member in groups:
            if mask_key(member) == key and member.number in reconstructions:
                untrained = member.settings.optimisation.epochs == 0
                note = "untrained" if untrained else "reconstruction"
                rows.append(Row("reconstruction", member.name, reconstructions[member.number], note, run=member.number))
    return rows


def _by_mask(groups: Sequence[RunGroup]) -> dict[MaskKey, RunGroup]:
    """Return the first run with each mask, preferably a trained one."""
    by_mask: dict[MaskKey, RunGroup] = {}
    for group in sorted(groups, key=lambda group: group.settings.optimisation.epochs == 0):
        by_mask.setdefault(mask_key(group), group)
    return by_mask


def mask_key(group: RunGroup) -> MaskKey:
    """Key of a run's mask: runs with equal keys mask a clip identically. A learned mask is unique to its run."""
    settings = group.settings
    own = group.name if learns_mask(settings) else settings.mask_settings
    return (*group.mask, settings.teacher, own)


def _own_masks(groups: Sequence[RunGroup], cuts: Sequence[Cut], results: Results) -> dict[MaskKey, list[RunMask]]:
    """Draw the masks of runs with a frame teacher, one per cut; learned masks only if the run has weights."""
    masks: dict[MaskKey, list[RunMask]] = {}
    no_masks: list[RunMask] = []
    for key, group in _by_mask(groups).items():
        run, settings = group.instances[0], group.instances[0].settings
        if draws_own_mask(settings) and (run.weights is not None or not learns_mask(settings)):
            draw = partial(draw_run_masks, settings, run.weights, cuts)
            masks[key] = results.attempt(f"mask of {run.name}", draw, no_masks)
    return masks


def _mask_rows(cut: Cut, group: RunGroup) -> list[Row]:
    strategy, ratio = group.mask
    masked = mask_cut(cut, strategy, ratio, group.settings.teacher)
    return [] if masked is None else [mask_row(cut, f"{strategy} {ratio:g}", masked, ratio=ratio)]


def _try_reconstruct(group: RunGroup, cuts: Sequence[Cut], results: Results) -> list[film_strips.Tiles]:
    no_tiles: list[film_strips.Tiles] = []
    run = group.instances[0]
    try:
        return results.attempt(f"reconstructions of {run.name}", partial(reconstruct, run, cuts), no_tiles)
    except RuntimeError as error:  # raised by torch for weights that do not fit the config
        results.problems.append(f"reconstructions of {run.name}: {error}")
        return no_tiles


def reconstruct(run: Run, cuts: Sequence[Cut]) -> list[film_strips.Tiles]:
    """Reconstruct each cut with a run's model, as tiles [F, S, S, 3] like those of the frames.

    Runs on the CPU, so that the output bytes do not depend on the GPU.
    """
    assert run.weights is not None
    method = load_method(run.settings, run.weights)
    tiles = []
    for cut in cuts:
        video = method.reconstruct(cut.batch)["video"]
        tiles.append(show_video((video * 255).round().to(torch.uint8), cut.frame_indices))
    return tiles
