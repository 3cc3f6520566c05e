"""Which frames of a clip are taken, as positions on its stored grid."""

import numpy as np
from numpy.typing import NDArray


def spread_positions(start: int, frames: int, stride: int, stored: int) -> NDArray[np.int64]:
    """`frames` positions from `start` in steps of `stride`; at the end the last one repeats (VideoMAE).

    The last one is the last that a step of `stride` reaches, not the clip's last frame.
    """
    reachable = (stored - 1 - start) // stride
    return start + stride * np.minimum(np.arange(frames), reachable)


def sample_window(generator: np.random.Generator, frames: int, stride: int, stored: int) -> NDArray[np.int64]:
    """A random window for training: VideoMAE's dense sampling, its start uniform where frames * stride fit.

    A clip shorter than that starts at 0 and repeats its last reachable frame.
    """
    start = int(generator.integers(max(0, stored - frames * stride) + 1))
    return spread_positions(start, frames, stride, stored)


def view_windows(views: int, frames: int, stride: int, stored: int) -> list[NDArray[np.int64]]:
    """Windows for evaluation, starts spread evenly over all that fit; a single view is the middle one."""
    last = max(0, stored - 1 - (frames - 1) * stride)
    starts = [last // 2] if views == 1 else [round(last * view / (views - 1)) for view in range(views)]
    return [spread_positions(start, frames, stride, stored) for start in starts]
