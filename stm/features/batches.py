"""Puts the clips of many videos through a model in full batches, with results that depend on the inputs alone.

Matrix products may differ in the last bit with the number of rows and a row's place among them. A clip's place is therefore a
function of the clips before it, and batches have a fixed size: neither the number of decoding processes nor an interruption
changes a bit.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from stm.features.model import ClipModel

Deliver = Callable[[int, int, NDArray[np.float32]], None]  # item, clip of it, values


class ClipBatches:
    """Collects clips to batches, and delivers the model's output for each clip.

    Args:
        model: takes batches of uint8 [B, T, 3, S, S].
        size: B.
        deliver: called with the item, the clip's number and its values, float32 of the model's shape.
        precision: `bf16` enables autocast.
    """

    def __init__(
        self, model: ClipModel, size: int, device: torch.device, deliver: Deliver, precision: str = "float32"
    ) -> None:
        a = model.architecture
        self._function = model.function
        self._device = device
        self._deliver = deliver
        self._bf16 = precision == "bf16"
        self._pixels = np.zeros((size, a.frames, 3, a.image_size, a.image_size), np.uint8)
        self._owners: list[tuple[int, int] | None] = [None] * size
        self._batch = 0  # number of the batch that is being filled
        self._next = 0  # place of the next clip, counted over all batches
        self._start = 0  # place of the current item's first clip

    @property
    def next(self) -> int:
        """The place of the next clip, counted over all batches."""
        return self._next

    @property
    def computed(self) -> int:
        """The place up to which no clip waits for its batch to be full."""
        waiting = (row for row, owner in enumerate(self._owners) if owner is not None)
        row = next(waiting, None)
        return self._next if row is None else self._batch * len(self._owners) + row

    def skip(self, clips: int) -> None:
        """Leave out the places of an item whose values are known."""
        self._next += clips

    def begin(self) -> None:
        """Begin the next item."""
        self._start = self._next

    def restart(self) -> None:
        """Forget the current item's clips that wait; its next clip is its first again."""
        batch, row = divmod(self._start, len(self._owners))
        self._next = self._start
        if batch <= self._batch:  # otherwise it has no clips yet
            first = row if batch == self._batch else 0  # those of a later batch are all its own
            self._owners[first:] = [None] * (len(self._owners) - first)

    def add(self, item: int, clip: int, pixels: NDArray[np.uint8]) -> None:
        """Take a clip, uint8 [T, 3, S, S], of the current item."""
        batch, row = divmod(self._next, len(self._owners))
        if batch != self._batch:
            self.flush()
            self._batch = batch
        self._pixels[row] = pixels
        self._owners[row] = (item, clip)
        self._next += 1
        if row == len(self._owners) - 1:
            self.flush()

    def flush(self, end: bool = False) -> None:
        """Compute what waits; the last batch need not be full, and its size is rounded up to a power of two.

        Args:
            end: whether no further clip follows.
        """
        if not any(self._owners):
            return
        size = len(self._owners)
        if end and self._next < (self._batch + 1) * size:
            size = min(size, 1 << (self._next - self._batch * size - 1).bit_length())
        values = self._compute(size)
        for owner, value in zip(self._owners, values, strict=False):
            if owner is not None:
                self._deliver(*owner, value)
        self._owners = [None] * len(self._owners)
        self._pixels[:] = 0

    @torch.inference_mode()
    def _compute(self, size: int) -> NDArray[np.float32]:
        # Copied: the buffer is filled again while a GPU may still be reading.
        video = torch.from_numpy(self._pixels[:size].copy()).to(self._device)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16):
            values = self._function(video)
        return values.float().cpu().numpy()
