"""Masks of runs with a frame teacher, drawn as in training, with the guides that they are computed from.

UMT ranks its teacher's attention; STM mixes it with blobs around predicted points; ClusterSTM keeps one token per
cluster. `stm.report.clips.cuts` draws the masks of all other runs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from stm.config import Cluster, LanguageRun, Run, SpatioTemporal
from stm.data.guides.window import COMPUTED
from stm.masking import get_strategy, to_boolean
from stm.masking.cluster import cluster_tokens
from stm.models.spatiotemporal.mask import SampledMask
from stm.models.spatiotemporal.pair_predictor import Pairs
from stm.models.teachers.frame_teacher import TeacherOutput
from stm.report.clips import film_strips
from stm.report.clips.cuts import Cut, load_frame_teacher, mask_row
from stm.report.clips.film_strips import Row, Scale

FORMER = (220, 30, 30)  # dot colour: the point in the first frame of a pair
LATTER = (255, 255, 255)  # square colour: the point in the second frame
KEPT = (255, 255, 255)  # dot colour on the kept token of a cluster
MARK, SMALL_MARK = 9, 5  # pixels
SAMPLING = {"log_probability": "by log-probability", "as_released": "as released"}


@dataclass(frozen=True)
class LearnedMask:
    """A mask learned by STM: the predicted points, the sampled tokens, and the mix."""

    pairs: Pairs
    drawn: SampledMask
    mix: float  # weight of the blobs; the attention gets the remaining weight


@dataclass(frozen=True)
class RunMask:
    """A run's mask for one cut."""

    run: LanguageRun
    cut: Cut
    teacher: TeacherOutput
    masked: NDArray[np.bool_]  # [slots, side, side]
    learned: LearnedMask | None


def draws_own_mask(run: Run) -> TypeGuard[LanguageRun]:
    """Whether the run derives its mask from the output of its frame teacher."""
    return run.has_frame_teacher and any(need in COMPUTED for need in get_strategy(run.mask.strategy).needs)


def learns_mask(run: Run) -> bool:
    """Whether the run's mask depends on its weights."""
    return "spatiotemporal" in get_strategy(run.mask.strategy).needs


def draw_run_masks(run: LanguageRun, weights: Path | None, cuts: Sequence[Cut]) -> list[RunMask]:
    """Draw a run's mask for each cut, using the noise stored in the cut, so that the mask is reproducible.

    Args:
        run: a run for which `draws_own_mask` is true.
        weights: the run's weights; only needed for a learned mask.
        cuts: clips of the run's geometry.

    Raises:
        ValueError: the teacher cannot be loaded; or a learned mask is missing from the weights or incompatible.
    """
    # Methods with text import transformers, which takes seconds; most reports show no such run.
    from stm.methods.video_language import MediaMasks

    side = run.image_size // run.patch_size
    teacher = load_frame_teacher(run.teacher, side)
    predictor = None
    if learns_mask(run):
        from stm.methods.stm import load_mask

        if weights is None:
            raise ValueError("its mask is learned, but it has no weights")
        predictor = load_mask(weights, run, teacher.stem_width)
    media_masks = MediaMasks(run)
    masks = []
    for cut in cuts:
        output = teacher(cut.batch["video"])
        noise = cut.batch["guides"]["noise"]
        learned = None
        if predictor is not None:
            with torch.no_grad():
                pairs = predictor.compare(output.stem, noise.shape[1])
                drawn = predictor.sample(pairs.former, pairs.latter, output.attention, noise, run.mask.ratio)
            learned = LearnedMask(pairs, drawn, predictor.mix.detach().clamp(0, 1).item())
        kept = media_masks.keep(cut.batch, output, {} if learned is None else {"spatiotemporal": learned.drawn.score})
        hidden = to_boolean(kept, cut.geometry.slots, cut.geometry.tokens)[0].numpy()
        masks.append(RunMask(run, cut, output, hidden.reshape(-1, side, side), learned))
    return masks


# -------------------------------------------------------------------------------------------------------- rows


def run_mask_row(mask: RunMask, label: str, number: int | None = None) -> Row:
    """Build the row of a mask; `number` is the run's index, which determines its colour."""
    settings = mask.run.mask
    notes = [f"{settings.strategy} {settings.ratio:g}"]
    if mask.learned is not None:
        sampling = (mask.run.spatio_temporal or SpatioTemporal()).sampling
        divergence = max(0.0, float(mask.learned.drawn.divergence))  # rounding may make it slightly negative
        notes += [f"drawn {SAMPLING[sampling]}", f"{divergence:.3f} nats from uniform"]
        notes += ["untrained"] if mask.run.optimisation.epochs == 0 else []
    return mask_row(mask.cut, label, mask.masked, ", ".join(notes), number, settings.ratio)


def guide_rows(mask: RunMask, label: str, number: int | None = None) -> list[Row]:
    """Build the rows of the mask's guides: points with blobs, attention and mix; or clusters; or attention alone."""
    if "features" in get_strategy(mask.run.mask.strategy).needs:
        return [_clusters(mask, label, number)]
    attention = _heat_row(mask.cut, mask.teacher.attention, label, "teacher's attention", number)
    if mask.learned is None:
        return [attention]
    blobs, mix = mask.learned.drawn.blobs, mask.learned.mix
    note = "points and blobs, dot: pair with next frame, square: pair with previous"
    points = _mark_pairs(mask, _heat_row(mask.cut, blobs, label, note, number))
    mixture = mix * blobs + (1 - mix) * mask.teacher.attention
    note = f"mix, {mix:.2f} x blobs, {1 - mix:.2f} x attention"
    return [points, attention, _heat_row(mask.cut, mixture, label, note, number)]


def _heat_row(cut: Cut, shares: Tensor, label: str, note: str, number: int | None) -> Row:
    """Heat map of a distribution over each frame's tokens, [1, T, N], in multiples of the uniform distribution."""
    grid = cut.token_grid(shares * shares.shape[-1])
    # A few tokens receive so much of a teacher's attention that on a scale up to the maximum all others look alike.
    scale = Scale(float(grid.min()), float(np.percentile(grid, 99)), "times uniform")
    return Row("map", label, cut.outline(film_strips.heat_map(cut.frames, grid, scale)), note, scale, number)


def _mark_pairs(mask: RunMask, row: Row) -> Row:
    """Mark each frame's points: dots for its pair with the next frame, squares for its pair with the previous one.

    The last frame has no next frame and repeats the dot of the previous one, as do its blobs; see `merge_pairs`.
    """
    assert mask.learned is not None
    pairs, slots, side = mask.learned.pairs, mask.cut.slots, mask.cut.geometry.side
    no_point = torch.full((1, 1, 2), torch.nan)
    former = torch.cat([pairs.former, pairs.former[:, -1:]], dim=1)[0, slots, None]
    latter = torch.cat([no_point, pairs.latter], dim=1)[0, slots, None]
    tiles = film_strips.mark_points(row.tiles, place_points(latter.numpy(), side), "square", LATTER, MARK)
    tiles = film_strips.mark_points(tiles, place_points(former.numpy(), side), "dot", FORMER, MARK)
    return replace(row, tiles=tiles)


def place_points(points: NDArray[np.float32], side: int) -> NDArray[np.float64]:
    """Convert points [..., 2], with -1 and 1 at the centres of the outermost tokens, to fractions of the frame."""
    return ((points.astype(np.float64) + 1) / 2 * (side - 1) + 0.5) / side


def _clusters(mask: RunMask, label: str, number: int | None) -> Row:
    """Build the row of each frame's clusters, distinguished by colour, with a dot on each cluster's kept token."""
    cut, side = mask.cut, mask.cut.geometry.side
    count = side**2 - int(mask.masked[0].sum())
    features = normalize(mask.teacher.tokens, dim=-1)
    labels = cluster_tokens(features, cut.batch["guides"]["noise"], count, mask.run.cluster or Cluster()).labels
    tiles = film_strips.color_groups(cut.frames, labels.reshape(-1, side, side)[cut.slots].numpy())
    kept = [np.argwhere(~masked)[:, ::-1] for masked in mask.masked[cut.slots]]  # (row, column) -> (x, y)
    tiles = film_strips.mark_points(cut.outline(tiles), (np.stack(kept) + 0.5) / side, "dot", KEPT, SMALL_MARK)
    return Row("map", label, tiles, f"{count} clusters per frame, dot: the kept token", run=number)
