"""How long an object stays among the kept tokens: counts per clip, their means, and what random masks reach.

A token lies on an object if the object's box covers at least half of it or, where the box covers no token that far, as much
of it as of any other token. An object is kept in a slot if at least one kept token lies on it. With a mask that is the same
in all slots, an object that does not move is kept in all of them or in none; masks that are drawn anew in each slot keep it
with the same probability whether or not it was kept before.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

import numpy as np
from numpy.typing import NDArray

from stm.evaluation.masks.box_coverage import share_in_cells

Counts = NDArray[np.float64]
Flags = NDArray[np.bool_]

COVERED = 0.5  # share of a token from which it lies on the object
# Boxes are stored as float32: of two tokens that a small object covers alike, one in each frame of a slot, both count.
_ROUNDING = 1e-5


def object_tokens(boxes: Counts, side: int, tubelet: int = 1) -> Flags:
    """The tokens that lie on an object.

    Args:
        boxes: [T, 4]: left, top, right, bottom as shares of the frame's sides; no area where the object is out of view.
        side: tokens per side of a frame.
        tubelet: frames per slot; what is covered is the mean over them.

    Returns:
        bool [slots, side * side]; no token in a slot without the object.
    """
    area = (boxes[:, 2] - boxes[:, 0]).clip(0) * (boxes[:, 3] - boxes[:, 1]).clip(0)
    covered = share_in_cells(boxes, side, side) * area[:, None] * side**2
    covered = covered.reshape(-1, tubelet, side**2).mean(axis=1)
    most = covered.max(axis=1, keepdims=True)
    return (covered >= np.minimum(COVERED, most) - _ROUNDING) & (most > 0)


@dataclass(frozen=True)
class ClipCounts:
    """What is counted in one clip, of S slots. Expected counts (of random masks) are not whole numbers."""

    kept: float  # slots in which the object is kept
    visible: int  # slots that show it
    again: Counts  # [S], by lag: pairs of slots that distance apart, which show the object, and in both of which it is kept
    before: Counts  # [S], by lag: the same, kept in the earlier slot of the pair

    @property
    def share(self) -> float:
        """Share of the object's visible slots in which it is kept."""
        return self.kept / self.visible


def count_kept(on: Flags, hidden: Flags) -> ClipCounts | None:
    """Count how a mask keeps an object.

    Args:
        on: [S, N], the tokens that lie on the object, see `object_tokens`.
        hidden: [S, N], the mask.

    Returns:
        The counts; None if no slot shows the object.
    """
    return _count(_any(on & ~hidden).astype(np.float64), _any(on))


def expect_random(on: Flags, kept_tokens: int) -> ClipCounts | None:
    """The expected counts of masks that keep `kept_tokens` random tokens of each slot, drawn anew in each; as `count_kept`.

    n tokens lie on the object: none of them is kept with probability C(N - n, K) / C(N, K) (hypergeometric).
    """
    tokens = on.shape[1]
    ways = comb(tokens, kept_tokens)
    return _count(np.array([1 - comb(tokens - int(n), kept_tokens) / ways for n in on.sum(axis=1)]), _any(on))


def _any(flags: Flags) -> Flags:
    """Whether any token of each slot is flagged: [S, N] -> [S]."""
    return np.asarray(flags.any(axis=1))


def _count(kept: Counts, visible: Flags) -> ClipCounts | None:
    """Count from the probability that each slot keeps the object, [S], independent between slots, and from what shows it."""
    if not visible.any():
        return None
    kept = kept * visible
    again, before = np.zeros(len(kept)), np.zeros(len(kept))
    again[0] = before[0] = kept.sum()
    for lag in range(1, len(kept)):
        again[lag] = (kept[:-lag] * kept[lag:]).sum()
        before[lag] = (kept[:-lag] * visible[lag:]).sum()
    return ClipCounts(float(kept.sum()), int(visible.sum()), again, before)


@dataclass(frozen=True)
class Persistence:
    """The means over clips.

    Attributes:
        kept_share: share of an object's visible slots in which it is kept, averaged over clips.
        persistence: of the slots that show an object after one in which it is kept, the share in which it is kept; over all
            pairs of slots of all clips. NaN if no object is kept in a slot before another.
        by_lag: the same by the distance of the two slots, from 0, where it is 1; NaN where there are no pairs.
    """

    kept_share: float
    persistence: float
    by_lag: list[float]


def average(clips: Sequence[ClipCounts]) -> Persistence:
    """Average the counts of clips, of which there must be one, with equal numbers of slots."""
    again, before = (np.sum([getattr(clip, name) for clip in clips], axis=0) for name in ("again", "before"))
    return Persistence(
        kept_share=float(np.mean([clip.share for clip in clips])),
        persistence=float(_divide(again[1:].sum(), before[1:].sum())),
        by_lag=_divide(again, before).tolist(),
    )


def _divide(part: Counts, whole: Counts) -> Counts:
    return np.divide(
        part, whole, out=np.full_like(np.asarray(part, dtype=np.float64), np.nan), where=np.asarray(whole) > 0
    )


def bootstrap_ratio(clips: Sequence[ClipCounts], draws: int = 2000) -> tuple[float, float] | None:
    """95 % percentile bootstrap interval of `persistence` over clips, with a fixed seed; None if it is NaN."""
    again, before = (np.array([getattr(clip, name)[1:].sum() for clip in clips]) for name in ("again", "before"))
    if not before.any():
        return None
    resamples = np.random.default_rng(0).integers(len(clips), size=(draws, len(clips)))
    low, high = np.nanpercentile(_divide(again[resamples].sum(axis=1), before[resamples].sum(axis=1)), [2.5, 97.5])
    return float(low), float(high)
