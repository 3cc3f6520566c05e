"""Samples frames of a clip, as positions among its stored frames. All rules apply to clips of any length.

`dense`: frames `stride` apart, as in VideoMAE on Kinetics. `tsn`: the clip is divided into as many equal segments as frames
are needed, and one frame is sampled from each, as in VideoMAE on Something-Something (after TSN). `sparse`: likewise, with the
segments and views of UMT on Kinetics. `intervals`: likewise, as UMT on videos with texts.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from stm.config import CaptionChoice, Sampling


def spread_positions(start: int, frames: int, stride: int, stored: int) -> NDArray[np.int64]:
    """`frames` positions from `start` in steps of `stride`; past the clip's end, the last position is repeated (VideoMAE).

    That is the last position that steps of `stride` reach, which need not be the clip's last frame.
    """
    reachable = (stored - 1 - start) // stride
    return start + stride * np.minimum(np.arange(frames), reachable)


def sample_window(
    generator: np.random.Generator, frames: int, stride: int, stored: int, sampling: Sampling = "dense"
) -> NDArray[np.int64]:
    """A random window for training, int64 [frames], ascending.

    `dense`: VideoMAE's dense sampling, with a uniform start if frames * stride stored frames fit into the clip; in a shorter
    clip the window starts at 0 and repeats the last reachable frame. `tsn`: see `sample_segments`, `sparse`: see
    `sample_sparse`, `intervals`: see `sample_intervals`; `stride` is not used.
    """
    if sampling == "tsn":
        return sample_segments(generator, frames, stored)
    if sampling == "sparse":
        return sample_sparse(generator, frames, stored)
    if sampling == "intervals":
        return sample_intervals(generator, frames, stored)
    # frames * stride, not (frames - 1) * stride + 1: in VideoMAE a window includes the stride after its last frame.
    start = int(generator.integers(max(0, stored - frames * stride) + 1))
    return spread_positions(start, frames, stride, stored)


def sample_segments(generator: np.random.Generator, frames: int, stored: int) -> NDArray[np.int64]:
    """One random frame from each of `frames` equal segments that cover the whole clip.

    A frame's probability is its share of the segment. If `stored` is a multiple of `frames`, this is VideoMAE's rule.
    Otherwise VideoMAE's segments are stored // frames frames long, so that up to frames - 1 frames at the clip's end are never
    sampled, and a clip with fewer frames than segments is reduced to frame 0.
    """
    # In units of 1 / `frames` of a frame, a segment is `stored` long and a frame is `frames` long, so all shares are integers.
    return (np.arange(frames) * stored + generator.integers(stored, size=frames)) // frames


def sample_sparse(generator: np.random.Generator, frames: int, stored: int) -> NDArray[np.int64]:
    """One random frame from each segment, as in UMT on Kinetics: neighbouring segments share the frame between them."""
    bounds = _sparse_bounds(frames, stored)
    return generator.integers(bounds[:-1], bounds[1:], endpoint=True)


def sample_intervals(generator: np.random.Generator, frames: int, stored: int) -> NDArray[np.int64]:
    """One random frame from each interval, as in UMT on videos with texts: never an interval's last frame.

    If an interval has a single frame, the frames are sampled from the whole clip instead, without replacement. A clip with
    fewer than `frames` frames is shown as a whole, and its last frame repeated.
    """
    taken = min(frames, stored)
    bounds = _interval_bounds(taken, stored)
    lengths = np.diff(bounds)
    if lengths.min() > 1:
        chosen = bounds[:-1] + generator.integers(lengths - 1)
    else:
        chosen = np.sort(generator.choice(stored, taken, replace=False))
    return _repeat_last(chosen, frames)


def _interval_bounds(intervals: int, stored: int) -> NDArray[np.int64]:
    """The starts of `intervals` intervals of stored / intervals, rounded down, and the clip's end: int64 [intervals + 1]."""
    return np.linspace(0, stored, intervals + 1).astype(np.int64)


def _repeat_last(positions: NDArray[np.int64], frames: int) -> NDArray[np.int64]:
    """`frames` positions: the given ones, and the last of them repeated."""
    return positions[np.minimum(np.arange(frames), len(positions) - 1)]


def _sparse_bounds(frames: int, stored: int) -> NDArray[np.int64]:
    """The ends of `frames` segments of (stored - 1) / frames, rounded: int64 [frames + 1], from 0 to stored - 1."""
    return np.round((stored - 1) / frames * np.arange(frames + 1)).astype(np.int64)


def view_windows(
    views: int, frames: int, stride: int, stored: int, sampling: Sampling = "dense"
) -> list[NDArray[np.int64]]:
    """`views` deterministic windows for evaluation, int64 [frames] each."""
    if sampling == "tsn":
        return [segment_window(view, views, frames, stored) for view in range(views)]
    if sampling == "sparse":
        return [sparse_window(view, views, frames, stored) for view in range(views)]
    if sampling == "intervals":
        return [interval_window(view, views, frames, stored) for view in range(views)]
    if views == 1:
        last = max(0, stored - 1 - (frames - 1) * stride)
        return [spread_positions(last // 2, frames, stride, stored)]
    return [dense_window(view, views, frames, stride, stored) for view in range(views)]


def dense_window(view: int, views: int, frames: int, stride: int, stored: int) -> NDArray[np.int64]:
    """VideoMAE's test view on Kinetics: the window of the T frames 0, stride, 2 stride, ... that starts at int(view *
    (T - frames) / (views - 1)). The first view starts at the beginning of the clip, and the last one ends at its end; a short
    clip repeats its last frame.
    """
    taken = (stored - 1) // stride + 1
    start = view * max(0, taken - frames) // (views - 1)
    return spread_positions(start * stride, frames, stride, stored)


def segment_window(view: int, views: int, frames: int, stored: int) -> NDArray[np.int64]:
    """The frame at the fraction view / views of each segment; a single view samples the middle of each segment.

    With two views this is VideoMAE's test on Something-Something: it merges {tick / 2 + tick * x} and {tick * x}, where tick is
    a segment's length and x its index, sorts them, and view k consists of every second position from the k-th on.
    """
    part, parts = (1, 2) if views == 1 else (view, views)
    return stored * (parts * np.arange(frames) + part) // (frames * parts)


def sparse_window(view: int, views: int, frames: int, stored: int) -> NDArray[np.int64]:
    """UMT's test view on Kinetics: the frame at the fraction (view + 1) / (views + 1) of each segment, rounded down."""
    offset = int((stored - 1) / frames / (views + 1) * (view + 1))
    return np.minimum(_sparse_bounds(frames, stored)[:-1] + offset, stored - 1)


def interval_window(view: int, views: int, frames: int, stored: int) -> NDArray[np.int64]:
    """UMT's test on videos with texts, which has one view: the middle frame of each interval, the earlier one of two.

    Several views lie in the middle of equal parts of each interval. A clip with fewer than `frames` frames repeats its last.
    """
    bounds = _interval_bounds(min(frames, stored), stored)
    last = np.diff(bounds) - 1
    return _repeat_last(bounds[:-1] + last * (2 * view + 1) // (2 * views), frames)


def choose_captions(captions: int, sources: Sequence[str], choice: CaptionChoice) -> list[int]:
    """Indices of the captions that may be sampled for a clip, ascending.

    Args:
        captions: number of captions of the clip.
        sources: the source of each caption; empty in shards of the first version, whose captions count as one source.
    """
    names = list(sources) or [""] * captions
    chosen = dict.fromkeys(names) if choice.sources is None else choice.sources
    groups = [[number for number, name in enumerate(names) if name == source] for source in chosen]
    return sorted(group[place] for group in groups for place in spread(len(group), choice.count))


def spread(total: int, count: int | None) -> list[int]:
    """`count` of `total` indices, at the centres of equal segments; all of them if `total` is at most `count`.

    Captions describe key frames at the centres of a clip's equal segments. They are thinned out to those whose segment
    contains one of `count` uniform key frames: with 3 captions and a count of 1 the middle one, as in TGM's ablation.
    """
    if count is None or count >= total:
        return list(range(total))
    return [(2 * place + 1) * total // (2 * count) for place in range(count)]
