"""Masks of the runs with a teacher of frames, as the runs themselves draw them, and what they are made from.

UMT ranks its teacher's attention; STM mixes it with blobs around points that it has learned to predict; ClusterSTM keeps
one token a cluster. Runs without such a teacher, and masks of packed guides, are in `stm.report.clips.cuts`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
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
from stm.methods.video_language import MediaMasks
from stm.models.spatiotemporal.mask import Drawn
from stm.models.spatiotemporal.pair_predictor import Pairs
from stm.models.teachers.frame_teacher import TeacherOutput
from stm.report.clips import film_strips
from stm.report.clips.cuts import Cut, load_frame_teacher, mask_row
from stm.report.clips.film_strips import Row, Scale

FORMER, LATTER, KEPT = (220, 30, 30), (255, 255, 255), (255, 255, 255)  # colours of marks
MARK, SMALL_MARK = 9, 5  # pixels
SAMPLING = {"log_probability": "by log-probability", "as_released": "as released"}


@dataclass(frozen=True)
class Learned:
    """What STM's mask says of a cut."""

    pairs: Pairs
    drawn: Drawn
    mix: float  # share of the blobs; the attention has the rest


@dataclass(frozen=True)
class RunMask:
    """A run's mask of a cut."""

    run: LanguageRun
    cut: Cut
    seen: TeacherOutput
    masked: NDArray[np.bool_]  # [slots, side, side]
    learned: Learned | None


def draws_own_mask(run: Run) -> TypeGuard[LanguageRun]:
    """Whether it has a teacher of frames that its mask is made from."""
    return run.has_frame_teacher and any(need in COMPUTED for need in get_strategy(run.mask.strategy).needs)


def learns_mask(run: Run) -> bool:
    """Whether its mask is in its weights."""
    return "spatiotemporal" in get_strategy(run.mask.strategy).needs


def draw_run_masks(run: LanguageRun, weights: Path | None, cuts: Sequence[Cut]) -> list[RunMask]:
    """The mask of each cut, by the noise of the cut, so that it is the same each time.

    Args:
        run: one that `draws_own_mask`.
        weights: its weights, which only a learned mask is read from.
        cuts: of the run's geometry.

    Raises:
        ValueError: the teacher cannot be loaded; or the mask is learned, and the weights hold none that fits.
    """
    side = run.image_size // run.patch_size
    teacher = load_frame_teacher(run.teacher, side)
    predictor = None
    if learns_mask(run):
        from stm.methods.stm import load_mask  # imports transformers, which takes seconds

        if weights is None:
            raise ValueError("its mask is learned, and there are no weights")
        predictor = load_mask(weights, run, teacher.stem_width)
    masks, found = MediaMasks(run), []
    for cut in cuts:
        seen, noise = teacher(cut.batch["video"]), cut.batch["guides"]["noise"]
        learned = None
        if predictor is not None:
            with torch.no_grad():
                pairs = predictor.compare(seen.stem, noise.shape[1])
                drawn = predictor.draw(pairs.former, pairs.latter, seen.attention, noise, run.mask.ratio)
            learned = Learned(pairs, drawn, predictor.mix.detach().clamp(0, 1).item())
        kept = masks.keep(cut.batch, seen, {} if learned is None else {"spatiotemporal": learned.drawn.score})
        hidden = to_boolean(kept, cut.geometry.slots, cut.geometry.tokens)[0].numpy()
        found.append(RunMask(run, cut, seen, hidden.reshape(-1, side, side), learned))
    return found


# -------------------------------------------------------------------------------------------------------- rows


def run_mask_row(found: RunMask, label: str, run: int | None = None) -> Row:
    """The mask that the run draws."""
    mask, notes = found.run.mask, []
    if found.learned is not None:
        sampling = (found.run.spatio_temporal or SpatioTemporal()).sampling
        divergence = max(0.0, float(found.learned.drawn.divergence))  # rounding may leave it below 0
        notes += [f"drawn {SAMPLING[sampling]}", f"{divergence:.3f} nats from uniform"]
    notes += ["untrained"] if found.learned is not None and found.run.optimisation.epochs == 0 else []
    note = ", ".join([f"{mask.strategy} {mask.ratio:g}", *notes])
    return mask_row(found.cut, label, found.masked, note, run, mask.ratio)


def guide_rows(found: RunMask, label: str, run: int | None = None) -> list[Row]:
    """What the mask is made from: points with blobs, attention and mix; or clusters; or attention alone."""
    if "features" in get_strategy(found.run.mask.strategy).needs:
        return [_clusters(found, label, run)]
    attention = _heat(found.cut, found.seen.attention, label, "teacher's attention", run)
    if found.learned is None:
        return [attention]
    drawn, mix = found.learned.drawn, found.learned.mix
    points = _heat(
        found.cut, drawn.blobs, label, "points and blobs, dot: pair with next frame, square: pair with previous", run
    )
    mixture = mix * drawn.blobs + (1 - mix) * found.seen.attention
    shares = f"mix, {mix:.2f} x blobs, {1 - mix:.2f} x attention"
    return [_mark_pairs(found, points), attention, _heat(found.cut, mixture, label, shares, run)]


def _heat(cut: Cut, shares: Tensor, label: str, note: str, run: int | None) -> Row:
    """Shares of each frame, [1, T, N], as multiples of what each token would have if all had the same."""
    cells = cut.cells(shares * shares.shape[-1])
    # A teacher looks so hard at a few tokens that all others would look alike.
    scale = Scale(float(cells.min()), float(np.percentile(cells, 99)), "times uniform")
    return Row("map", label, cut.outline(film_strips.heat(cut.frames, cells, scale)), note, scale, run)


def _mark_pairs(found: RunMask, row: Row) -> Row:
    """The points in each frame: that of its pair with the next frame, a dot, and with the frame before, a square.

    Blobs are drawn around both. Those of the last frame are drawn around the dot of the frame before, which is shown
    there again, and not around the square; see `merge_pairs`.
    """
    assert found.learned is not None
    pairs, none = found.learned.pairs, torch.full((1, 1, 2), torch.nan)
    former = torch.cat([pairs.former, pairs.former[:, -1:]], dim=1)[0]
    latter = torch.cat([none, pairs.latter], dim=1)[0]
    places = [
        place_points(points[found.cut.slots, None].numpy(), found.cut.geometry.side) for points in (former, latter)
    ]
    tiles = film_strips.mark_points(row.tiles, places[1], "square", LATTER, MARK)
    tiles = film_strips.mark_points(tiles, places[0], "dot", FORMER, MARK)
    return Row(row.kind, row.label, tiles, row.note, row.scale, row.run)


def place_points(points: NDArray[np.float32], side: int) -> NDArray[np.float64]:
    """Points in half frames, where -1 and 1 are the middles of the outermost tokens, as shares of the frame."""
    return ((points.astype(np.float64) + 1) / 2 * (side - 1) + 0.5) / side


def _clusters(found: RunMask, label: str, run: int | None) -> Row:
    """Clusters of each frame by colour, and the token of each that is kept."""
    cut, side = found.cut, found.cut.geometry.side
    count = side**2 - int(found.masked[0].sum())
    features = normalize(found.seen.tokens, dim=-1)
    labels = cluster_tokens(features, cut.batch["guides"]["noise"], count, found.run.cluster or Cluster()).labels
    tiles = film_strips.color_groups(cut.frames, labels.reshape(-1, side, side)[cut.slots].numpy())
    kept = [np.argwhere(~masked)[:, ::-1] for masked in found.masked[cut.slots]]
    tiles = film_strips.mark_points(cut.outline(tiles), (np.stack(kept) + 0.5) / side, "dot", KEPT, SMALL_MARK)
    return Row("map", label, tiles, f"{count} clusters a frame, dot: the kept token", run=run)
