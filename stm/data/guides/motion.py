"""Motion of the sampled frames, from the packed vectors of the stored ones."""

import numpy as np
from numpy.typing import NDArray

from stm.data.guides.maker import GuideMaker


def motion_between(magnitude: NDArray[np.floating], positions: NDArray[np.int64], step: int) -> NDArray[np.float32]:
    """The motion leading to each sampled frame: the mean over the `step` stored frames that end with it.

    With a step of 1 this is the frame's own map. At the clip's start, the mean is over the frames that exist.

    Args:
        magnitude: [stored frames, rows, columns], magnitude of the motion from the previous stored frame to each frame.
        positions: the sampled frames, ascending.
        step: stored frames from one sampled frame to the next.

    Returns:
        float32 [frames, rows, columns], per step between stored frames.
    """
    back = positions - np.arange(step)[:, None]
    inside = (back >= 0).astype(np.float32)
    steps = magnitude[np.maximum(back, 0)].astype(np.float32) * inside[:, :, None, None]
    mean: NDArray[np.float32] = steps.sum(axis=0) / inside.sum(axis=0)[:, None, None]
    return mean


def compensate(motion: NDArray[np.floating]) -> NDArray[np.float32]:
    """The length of each cell's vector after subtracting the frame's median vector, an estimate of the camera motion.

    Args:
        motion: [stored frames, rows, columns, 3]: magnitude, x, y, over the whole frame.

    Returns:
        float32 [stored frames, rows, columns], in the packed unit: cells per stored frame.
    """
    vectors = motion[..., 1:].astype(np.float32)
    # The median, not the mean: it ignores moving objects as long as they cover less than half of the frame.
    own = vectors - np.median(vectors, axis=(1, 2), keepdims=True)
    return np.hypot(own[..., 0], own[..., 1])


MOTION = GuideMaker(
    {
        "motion": lambda stored: motion_between(stored.values[..., 0], stored.taken, stored.step),
        "motion_compensated": lambda stored: motion_between(compensate(stored.values), stored.taken, stored.step),
    },
    looks_back=True,
)
