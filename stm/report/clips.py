"""Pictures of single clips: frames, maps, every mask and every reconstruction, over the slots of a training clip.

The clips are cut as in evaluation: the middle window, the central square, no flip. Guides and masks are those that
training would see for that cut.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stm.config import Augmentation, Config
from stm.data.crops import center_crop
from stm.data.dataset import ClipDataset
from stm.data.geometry import Geometry
from stm.data.sampling import view_windows
from stm.layout import Layout
from stm.masking import get_strategy, to_boolean
from stm.methods import build_method
from stm.models import zoo
from stm.report import strips
from stm.report.choose import Chosen, choose_clips
from stm.report.records import Results, Run
from stm.report.strips import Row, Scale

MOST_SLOTS = 8  # columns; longer clips show every n-th slot
MAPS = {"similarity": ("Text similarity", "cosine"), "motion": ("Motion", "cells per stored frame")}

Numbered = tuple[int, Run]  # a run with its number in the config


@dataclass(frozen=True)
class Cut:
    """A clip cut to a geometry, S pixels a side as it is shown."""

    clip: Chosen
    geometry: Geometry
    batch: Mapping[str, Any]  # of one sample
    caption: str
    slots: list[int]  # those that are shown
    frames: strips.Tiles  # [shown slots, S, S, 3]: the first frame of each
    boxes: NDArray[np.float64] | None  # [frames, 4], shares of the crop; NaN: outside

    def outline(self, tiles: strips.Tiles) -> strips.Tiles:
        """The tiles with the true box drawn, where there is one."""
        if self.boxes is None:
            return tiles
        return strips.draw_boxes(tiles, self.boxes[[slot * self.geometry.tubelet for slot in self.slots]])


@dataclass(frozen=True)
class ClipPicture:
    """One clip, ready to be shown."""

    clip: Chosen
    caption: str  # the one that the similarity is of
    rows: list[Row]


def picture_clips(config: Config, layout: Layout, results: Results) -> list[ClipPicture]:
    """Up to `config.report.clips` clips; fewer, or none, when there are no packed shards."""
    nothing: list[Chosen] = []
    chosen = results.attempt("choice of clips", partial(choose_clips, config, layout, results), nothing)
    rows: dict[str, list[Row]] = {clip.key: [] for clip in chosen}
    captions = dict.fromkeys(rows, "")
    for geometry, runs in _by_geometry(config, results.runs, chosen).items():
        none: list[Cut] = []
        cuts = results.attempt("frames of clips", partial(_cut_all, chosen, geometry, config.seed), none)
        predicted = {number: _attempt_predictions(run, cuts, results) for number, run in runs}
        for position, cut in enumerate(cuts):
            made = {number: tiles[position] for number, tiles in predicted.items() if tiles}
            rows[cut.clip.key] += [*_common_rows(cut), *_run_rows(cut, runs, made, results)]
            captions[cut.clip.key] = cut.caption
    return [ClipPicture(clip, captions[clip.key], rows[clip.key]) for clip in chosen if rows[clip.key]]


def _by_geometry(config: Config, runs: Sequence[Run], chosen: Sequence[Chosen]) -> dict[Geometry, list[Numbered]]:
    """The runs by the shape of their clips; without runs, one shape that suits the stored frames."""
    groups: dict[Geometry, list[Numbered]] = {}
    for number, run in enumerate(runs):
        groups.setdefault(Geometry.of(run.settings), []).append((number, run))
    if not groups and chosen:
        patch = max(1, config.frames.short_side // config.grid)
        frames = min(MOST_SLOTS, min(clip.frames for clip in chosen))
        stride = max(1, min(clip.frames for clip in chosen) // frames)
        groups[Geometry(patch * config.grid, patch, 1, frames, stride)] = []
    return groups


def _cut_all(chosen: Sequence[Chosen], geometry: Geometry, seed: int) -> list[Cut]:
    indexes: list[Path] = sorted({clip.index for clip in chosen})
    if not indexes:
        return []
    dataset = ClipDataset(indexes, geometry, Augmentation(crop="center", flip=False), seed, train=False)
    numbers = {dataset.index[number].key: number for number in range(len(dataset))}
    return [_cut(clip, geometry, dataset[numbers[clip.key]][0]) for clip in chosen]


def _cut(clip: Chosen, geometry: Geometry, sample: Mapping[str, Any]) -> Cut:
    step = -(-geometry.slots // MOST_SLOTS)
    slots = list(range(0, geometry.slots, step))
    video = torch.from_numpy(sample["video"])[None]
    guides = {name: torch.from_numpy(guide)[None] for name, guide in sample["guides"].items()}
    batch = {"video": video, "guides": guides}
    frames = _tiles(video, slots, geometry.tubelet)
    return Cut(clip, geometry, batch, str(sample["caption"]), slots, frames, _boxes_in_crop(clip, geometry))


def _tiles(video: Tensor, slots: Sequence[int], tubelet: int) -> strips.Tiles:
    """uint8 [1, T, 3, S, S] -> the first frame of each slot, at the size that is shown."""
    first = video[0, [slot * tubelet for slot in slots]]
    return strips.resize(np.ascontiguousarray(first.permute(0, 2, 3, 1).numpy()))


def _boxes_in_crop(clip: Chosen, geometry: Geometry) -> NDArray[np.float64] | None:
    """The true boxes of the cut's frames, clipped to the crop and as shares of it."""
    if clip.boxes is None:
        return None
    window = view_windows(1, geometry.frames, geometry.stride, clip.frames)[0]
    crop = center_crop(*clip.size)
    pixels = clip.boxes[window] * np.tile(clip.size, 2)
    shares = (pixels - np.tile([crop.left, crop.top], 2)) / np.tile([crop.width, crop.height], 2)
    inside = np.clip(shares, 0, 1)
    empty = (inside[:, 2:] <= inside[:, :2]).any(axis=1)
    inside[empty] = np.nan
    return inside


def _common_rows(cut: Cut) -> list[Row]:
    """Frames and maps."""
    shape = cut.geometry
    note = f"{shape.frames} frames" + (f", stride {shape.stride}" if shape.stride > 1 else "")
    rows = [Row("frames", "Frames", cut.outline(cut.frames), note)]
    for name, (label, unit) in MAPS.items():
        if name in cut.batch["guides"]:
            cells = cut.batch["guides"][name][0].view(-1, shape.side, shape.side)[cut.slots].float().numpy()
            scale = Scale(float(cells.min()), float(cells.max()), unit)
            rows.append(Row("map", label, cut.outline(strips.heat(cut.frames, cells, scale)), scale=scale))
    return rows


def _run_rows(cut: Cut, runs: Sequence[Numbered], predicted: Mapping[int, strips.Tiles], results: Results) -> list[Row]:
    """Each mask once, and under it the reconstructions of the runs that were trained with it."""
    rows: list[Row] = []
    for strategy, ratio in dict.fromkeys(run.mask for _, run in runs):
        mask = partial(_mask_row, cut, strategy, ratio)
        nothing: list[Row] = []
        rows += results.attempt(f"mask {strategy}", mask, nothing)
        for number, run in runs:
            if run.mask == (strategy, ratio) and number in predicted:
                note = "untrained" if run.settings.optimisation.epochs == 0 else ""
                rows.append(Row("reconstruction", run.name, predicted[number], note or "reconstruction", run=number))
    return rows


def _mask_row(cut: Cut, strategy: str, ratio: float) -> list[Row]:
    found, shape = get_strategy(strategy), cut.geometry
    if any(guide not in cut.batch["guides"] for guide in found.needs):
        return []
    kept = found(cut.batch["guides"], ratio)
    masked = to_boolean(kept, shape.slots, shape.tokens)[0].view(-1, shape.side, shape.side).numpy()
    tiles = cut.outline(strips.grey_out(cut.frames, masked[cut.slots]))
    covered = None if cut.boxes is None else hidden_share(cut.boxes, masked, shape.tubelet)
    note = "" if covered is None else f"hides {100 * covered:.0f} % of the box"
    return [Row("mask", f"{strategy} {ratio:g}", tiles, note)]


def hidden_share(boxes: NDArray[np.float64], masked: NDArray[np.bool_], tubelet: int) -> float | None:
    """Share of the boxes' area that lies under masked tokens, over all frames of the cut.

    Args:
        boxes: [frames, 4], shares of the crop; NaN rows count nothing.
        masked: [slots, side, side].

    Returns:
        None when no frame has a box.
    """
    side = masked.shape[1]
    edges = np.arange(side + 1) / side
    area = hidden = 0.0
    for frame, (x0, y0, x1, y1) in enumerate(boxes):
        if np.isfinite(x0):
            across = np.clip(np.minimum(edges[1:], x1) - np.maximum(edges[:-1], x0), 0, None)
            down = np.clip(np.minimum(edges[1:], y1) - np.maximum(edges[:-1], y0), 0, None)
            overlap = np.outer(down, across)
            area += overlap.sum()
            hidden += overlap[masked[frame // tubelet]].sum()
    return hidden / area if area else None


def _attempt_predictions(run: Run, cuts: Sequence[Cut], results: Results) -> list[strips.Tiles]:
    none: list[strips.Tiles] = []
    if run.weights is None:
        return none
    try:
        return results.attempt(f"reconstructions of {run.name}", partial(_predict, run, cuts), none)
    except RuntimeError as error:  # torch: weights that do not fit the config
        results.problems.append(f"reconstructions of {run.name}: {error}")
        return none


def _predict(run: Run, cuts: Sequence[Cut]) -> list[strips.Tiles]:
    """Each cut as a run's model paints it: tiles like the frames'. On the CPU, so that the bytes are the same anywhere."""
    assert run.weights is not None
    method = build_method(run.settings)
    method.model = zoo.load(run.weights)
    method.eval()
    tiles = []
    for cut in cuts:
        video = method.reconstruct(cut.batch)["video"]
        tiles.append(_tiles((video * 255).round().to(torch.uint8), cut.slots, cut.geometry.tubelet))
    return tiles
