"""From the motion of every decoded frame to the motion between stored frames."""

import numpy as np
from numpy.typing import NDArray

from stm.preprocess.motion.codec import Field

# Fields are added up together, because numpy takes longer to be called than to add up one of them.
_FIELDS_A_BATCH = 64


class MotionSum:
    """Adds up fields, frame by frame, over the steps between stored frames, and fills what is not known.

    A cell that a frame says nothing about (an I-frame, an intra block) takes a value between those of the
    nearest frames before and after that know it, in proportion to the time; at the ends of the clip, the nearest
    one's. Sums are added to as soon as both neighbours are there, so memory does not grow with the decoded frames.
    They are whole after `finish`.

    Args:
        decode_index: of the stored frames, rising.
        rows, columns: cells of the map.
    """

    def __init__(self, decode_index: NDArray[np.integer], rows: int, columns: int) -> None:
        self._ends = decode_index
        stored, cells = len(decode_index), rows * columns
        self.vector = np.zeros((stored, rows, columns, 2), np.float64)  # cells per step
        self.magnitude = np.zeros((stored, rows, columns), np.float64)
        # The same memory, with the cells in a row.
        self._vector, self._magnitude = self.vector.reshape(stored, cells, 2), self.magnitude.reshape(stored, cells)
        self._unknown = np.zeros((stored, cells), np.float64)  # decoded frames whose value is made up
        self._last = np.full(cells, -1)  # last frame that knew the cell; -1: none yet
        self._value = np.zeros((cells, 2), np.float64)  # what it knew
        self._waiting: list[Field] = []
        self._frames = 0

    def add(self, field: Field) -> None:
        """Takes the next frame's field; fields come with index 0, 1, 2, ... without a gap."""
        self._waiting.append(field)
        self._frames = field.index + 1
        if len(self._waiting) == _FIELDS_A_BATCH:
            self._add_waiting()

    def finish(self) -> bool:
        """Fills the end of the clip; False when no frame knew anything, so that nothing can be said."""
        self._add_waiting()
        seen = self._last >= 0
        if not seen.any():
            return len(self._ends) == 1  # a single frame has no step, so nothing is missing
        cells = np.flatnonzero(seen)
        self._fill(cells, self._last[cells], self._frames, self._value[cells], self._value[cells])
        self._last[cells] = self._frames - 1
        # A cell that no frame knew moves like the mean of all others.
        self._vector[:, ~seen] = self._vector[:, seen].mean(axis=1)[:, None]
        self._magnitude[:, ~seen] = self._magnitude[:, seen].mean(axis=1)[:, None]
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
        return np.rint(255.0 * self._unknown / frames[:, None]).astype(np.uint8).reshape(self.magnitude.shape)

    def _steps(self, index: NDArray[np.integer]) -> NDArray[np.int64]:
        """For each decoded frame the stored frame whose step ends at or after it; 0: in none."""
        steps = np.searchsorted(self._ends, index)
        return np.where(steps < len(self._ends), steps, 0)

    def _add_waiting(self) -> None:
        if not self._waiting:
            return
        cells = self._unknown.shape[1]
        vector = np.stack([field.vector for field in self._waiting]).reshape(-1, cells, 2)
        covered = np.stack([field.covered for field in self._waiting]).reshape(-1, cells)
        first, known = self._waiting[0].index, covered > 0
        self._waiting = []
        length = np.hypot(vector[..., 0], vector[..., 1])
        steps = self._steps(first + np.arange(len(vector)))
        for step in np.unique(steps[steps > 0]):
            here = steps == step
            self._unknown[step] += np.where(known[here], 1.0 - covered[here], 1.0).sum(axis=0)
            self._vector[step] += (vector[here] * known[here][..., None]).sum(axis=0)
            self._magnitude[step] += (length[here] * known[here]).sum(axis=0)
        self._bridge(first, vector, known)

    def _bridge(self, first: int, vector: NDArray[np.floating], known: NDArray[np.bool_]) -> None:
        """Fills the gaps that end in these frames, and remembers what each cell knew last."""
        frame = first + np.arange(len(known))[:, None]
        newest = np.maximum.accumulate(np.where(known, frame, self._last))  # that knew the cell, up to each frame
        before = np.concatenate([self._last[None], newest[:-1]])
        place, cell = np.nonzero(known & (frame - before > 1))
        old = before[place, cell]
        # What was known before these frames, or in one of them.
        value = np.where((old < first)[:, None], self._value[cell], vector[np.maximum(old - first, 0), cell])
        self._fill(cell, old, first + place, value, vector[place, cell].astype(np.float64))
        told = np.flatnonzero(newest[-1] >= first)
        self._last = newest[-1]
        self._value[told] = vector[self._last[told] - first, told]

    def _fill(
        self,
        cells: NDArray[np.integer],
        before: NDArray[np.integer],
        after: NDArray[np.integer] | int,
        old: NDArray[np.floating],
        new: NDArray[np.floating],
    ) -> None:
        """Gives cells [n] a value for each frame between `before` (-1: no frame) and `after`; old, new: [n, 2]."""
        span = after - before
        for offset in range(1, int(span.max(initial=0))):
            live = offset < span
            at, share = cells[live], np.where(before[live] >= 0, offset / span[live], 1.0)[:, None]
            between = (1.0 - share) * old[live] + share * new[live]
            step = self._steps(before[live] + offset)
            inside = step > 0
            # Twice the same step and cell is twice added: it may have two gaps.
            np.add.at(self._vector, (step[inside], at[inside]), between[inside])
            np.add.at(self._magnitude, (step[inside], at[inside]), np.hypot(*between[inside].T))
