"""Accumulation of the motion of decoded frames into the motion between stored frames."""

import numpy as np
from numpy.typing import NDArray

from stm.preprocess.motion.codec import Field

# Fields are added in batches, because numpy's call overhead exceeds the work for a single field.
_FIELDS_PER_BATCH = 64


class MotionSum:
    """Sums fields, frame by frame, over the steps between stored frames, and interpolates unknown cells.

    A cell whose motion is unknown in a frame (an I-frame, an intra block) is interpolated linearly in time between the
    nearest frames before and after in which it is known; at the ends of the clip, the nearest known value is used. Gaps
    are filled as soon as both neighbours are known, so memory use does not grow with the number of decoded frames. The
    sums are complete after `finish`.

    Args:
        decode_index: decode indices of the stored frames, ascending.
        rows, columns: size of the map, in cells.

    Attributes:
        vector: float64 [stored, rows, columns, 2], displacement in cells per step.
        magnitude: float64 [stored, rows, columns], path length in cells per step.
    """

    def __init__(self, decode_index: NDArray[np.integer], rows: int, columns: int) -> None:
        self._ends = decode_index  # step i ends with stored frame i; step 0, before the first one, is not summed
        stored, cells = len(decode_index), rows * columns
        self.vector = np.zeros((stored, rows, columns, 2), np.float64)
        self.magnitude = np.zeros((stored, rows, columns), np.float64)
        # Views of the same memory, with one axis for all cells.
        self._vector = self.vector.reshape(stored, cells, 2)
        self._magnitude = self.magnitude.reshape(stored, cells)
        self._unknown = np.zeros((stored, cells), np.float64)  # number of decoded frames whose value is interpolated
        self._last = np.full(cells, -1)  # last frame in which the cell is known; -1 if none yet
        self._value = np.zeros((cells, 2), np.float64)  # the cell's vector in that frame
        self._pending: list[Field] = []
        self._frames = 0

    def add(self, field: Field) -> None:
        """Add the next frame's field; indices must be 0, 1, 2, ... without gaps."""
        self._pending.append(field)
        self._frames = field.index + 1
        if len(self._pending) == _FIELDS_PER_BATCH:
            self._add_pending()

    def finish(self) -> bool:
        """Fill the gaps at the end of the clip, and return whether the motion of any cell is known."""
        self._add_pending()
        known = self._last >= 0
        if not known.any():
            return len(self._ends) == 1  # a single frame has no step, so nothing is missing
        cells = np.flatnonzero(known)
        self._fill(cells, self._last[cells], self._frames, self._value[cells], self._value[cells])
        self._last[cells] = self._frames - 1
        # A cell that is not known in any frame is set to the mean of all others.
        self._vector[:, ~known] = self._vector[:, known].mean(axis=1)[:, None]
        self._magnitude[:, ~known] = self._magnitude[:, known].mean(axis=1)[:, None]
        return True

    @property
    def complete(self) -> bool:
        """Whether the last stored frame has been reached."""
        return self._frames > self._ends[-1]

    @property
    def intra(self) -> NDArray[np.uint8]:
        """Interpolated fraction of each step, scaled to 0 to 255: uint8 [stored, rows, columns]."""
        if len(self._ends) == 1:
            return np.full(self.magnitude.shape, 255, np.uint8)
        frames = np.diff(self._ends, prepend=self._ends[0] - 1)
        return np.rint(255.0 * self._unknown / frames[:, None]).astype(np.uint8).reshape(self.magnitude.shape)

    def _steps(self, index: NDArray[np.integer]) -> NDArray[np.int64]:
        """Return, for each decoded frame, the index of the stored frame whose step contains it; 0 if none does."""
        steps = np.searchsorted(self._ends, index)
        return np.where(steps < len(self._ends), steps, 0)

    def _add_pending(self) -> None:
        if not self._pending:
            return
        cells = self._unknown.shape[1]
        vector = np.stack([field.vector for field in self._pending]).reshape(-1, cells, 2)
        covered = np.stack([field.covered for field in self._pending]).reshape(-1, cells)
        first = self._pending[0].index
        known = covered > 0
        self._pending = []
        length = np.hypot(vector[..., 0], vector[..., 1])
        steps = self._steps(first + np.arange(len(vector)))
        for step in np.unique(steps[steps > 0]):
            here = steps == step
            self._unknown[step] += np.where(known[here], 1.0 - covered[here], 1.0).sum(axis=0)
            self._vector[step] += (vector[here] * known[here][..., None]).sum(axis=0)
            self._magnitude[step] += (length[here] * known[here]).sum(axis=0)
        self._bridge(first, vector, known)

    def _bridge(self, first: int, vector: NDArray[np.floating], known: NDArray[np.bool_]) -> None:
        """Fill the gaps that end in the given frames, and update the last known vector of each cell."""
        frame = first + np.arange(len(known))[:, None]
        # The last frame in which each cell is known, up to and including each frame.
        newest = np.maximum.accumulate(np.where(known, frame, self._last))
        before = np.concatenate([self._last[None], newest[:-1]])
        position, cell = np.nonzero(known & (frame - before > 1))
        old = before[position, cell]
        # The vector before the gap comes from an earlier batch or from this one.
        value = np.where((old < first)[:, None], self._value[cell], vector[np.maximum(old - first, 0), cell])
        self._fill(cell, old, first + position, value, vector[position, cell].astype(np.float64))
        updated = np.flatnonzero(newest[-1] >= first)
        self._last = newest[-1]
        self._value[updated] = vector[self._last[updated] - first, updated]

    def _fill(
        self,
        cells: NDArray[np.integer],
        before: NDArray[np.integer],
        after: NDArray[np.integer] | int,
        old: NDArray[np.floating],
        new: NDArray[np.floating],
    ) -> None:
        """Interpolate cells [n] between frames `before` (-1: none) and `after`, from vectors `old` to `new`, [n, 2]."""
        span = after - before
        for offset in range(1, int(span.max(initial=0))):
            open_gaps = offset < span
            cell = cells[open_gaps]
            # Before the first known frame there is nothing to interpolate from, so the new vector has full weight.
            share = np.where(before[open_gaps] >= 0, offset / span[open_gaps], 1.0)[:, None]
            between = (1.0 - share) * old[open_gaps] + share * new[open_gaps]
            step = self._steps(before[open_gaps] + offset)
            inside = step > 0
            # `np.add.at`, because a cell with two gaps in a step occurs twice, and `+=` would add only one of them.
            np.add.at(self._vector, (step[inside], cell[inside]), between[inside])
            np.add.at(self._magnitude, (step[inside], cell[inside]), np.hypot(*between[inside].T))
