"""From the motion of every decoded frame to the motion between stored frames."""

import numpy as np
from numpy.typing import NDArray

from stm.preprocess.motion_vectors import Field


class MotionSum:
    """Adds up fields, frame by frame, over the steps between stored frames, and fills what is not known.

    A cell that a frame says nothing about (an I-frame, an intra block) takes a value between those of the
    nearest frames before and after that know it, in proportion to the time; at the ends of the clip, the nearest
    one's. Sums are added to as soon as both neighbours are there, so memory does not grow with the decoded frames.

    Args:
        decode_index: of the stored frames, rising.
        rows, columns: cells of the map.
    """

    def __init__(self, decode_index: NDArray[np.integer], rows: int, columns: int) -> None:
        self._ends = decode_index
        shape = (len(decode_index), rows, columns)
        self.vector = np.zeros((*shape, 2), np.float64)  # cells per step
        self.magnitude = np.zeros(shape, np.float64)
        self._unknown = np.zeros(shape, np.float64)  # decoded frames whose value is made up
        self._last = np.full((rows, columns), -1)  # last frame that knew the cell; -1: none yet
        self._value = np.zeros((rows, columns, 2), np.float64)
        self._frames = 0

    def add(self, field: Field) -> None:
        """Takes the next frame's field; fields come with index 0, 1, 2, ... without a gap."""
        known = field.covered > 0
        step = self._step(field.index)
        if step:
            self._unknown[step] += np.where(known, 1.0 - field.covered, 1.0)
        self._fill(field.index, field.vector, known & (self._last < field.index - 1))
        self._put(field.index, field.vector, known)
        self._last[known], self._value[known] = field.index, field.vector[known]
        self._frames = field.index + 1

    def finish(self) -> bool:
        """Fills the end of the clip; False when no frame knew anything, so that nothing can be said."""
        seen = self._last >= 0
        if not seen.any():
            return len(self._ends) == 1  # a single frame has no step, so nothing is missing
        self._fill(self._frames, self._value, seen & (self._last < self._frames - 1))
        # A cell that no frame knew moves like the mean of all others.
        self.vector[:, ~seen] = self.vector[:, seen].mean(axis=1)[:, None]
        self.magnitude[:, ~seen] = self.magnitude[:, seen].mean(axis=1)[:, None]
        return True

    @property
    def complete(self) -> bool:
        """Whether the last stored frame has been reached."""
        return self._frames > self._ends[-1]

    @property
    def intra(self) -> NDArray[np.uint8]:
        """The made-up share of each step, 0 to 255: uint8 [stored, rows, columns]."""
        if len(self._ends) == 1:
            return np.full(self.magnitude.shape, 255, np.uint8)
        frames = np.diff(self._ends, prepend=self._ends[0] - 1)
        return np.rint(255.0 * self._unknown / frames[:, None, None]).astype(np.uint8)

    def _step(self, index: int) -> int:
        """The stored frame whose step ends at or after this decoded frame; 0: in none."""
        step = int(np.searchsorted(self._ends, index))
        return step if step < len(self._ends) else 0

    def _put(self, index: int, vector: NDArray[np.floating], where: NDArray[np.bool_]) -> None:
        step = self._step(index)
        if step:
            self.vector[step][where] += vector[where]
            self.magnitude[step][where] += np.hypot(vector[..., 0], vector[..., 1])[where]

    def _fill(self, index: int, vector: NDArray[np.floating], where: NDArray[np.bool_]) -> None:
        """Gives the cells in `where` a value for each frame from their last known one to `index`."""
        if not where.any():
            return
        last = self._last
        for missing in range(int(last[where].min()) + 1, index):
            share = np.where(last >= 0, (missing - last) / np.maximum(index - last, 1), 1.0)[..., None]
            between = (1.0 - share) * self._value + share * vector
            self._put(missing, between, where & (last < missing))
