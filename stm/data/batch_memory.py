"""Memory for the pixels of batches: written once by whoever loads them, and used for one batch after another.

Loading processes hand batches over in shared memory. Fresh shared memory costs more than loading into it: the kernel fills its
pages with zeros and maps them one by one, 1.8 ms for a clip of 16 frames of 224x224 where writing it takes 0.08 ms. So each
loading process keeps a few pieces of shared memory, and the training process copies a batch out of its piece, to pinned memory
if there is a GPU, and gives the piece back.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stm.data.loading_processes import is_loading_process, share


class _Slot:
    """A piece of shared memory for the pixels of one batch at a time. Its last byte is 1 while a batch is in it."""

    def __init__(self, size: int) -> None:
        self.memory = share(torch.zeros(size + 1, dtype=torch.uint8))

    @property
    def size(self) -> int:
        return len(self.memory) - 1

    @property
    def is_free(self) -> bool:
        return not self.memory[-1]


class Parcel:
    """Pixels in a slot, on their way to the training process, where they arrive as `Received`."""

    def __init__(self, memory: Tensor, shape: tuple[int, ...]) -> None:
        self._memory, self._shape = memory, shape
        memory[-1] = 1

    def __reduce__(self) -> tuple[type["Received"], tuple[Tensor, tuple[int, ...]]]:
        return Received, (self._memory, self._shape)


class Received:
    """Pixels that a loading process has sent; its slot is free again once they were copied, or are not wanted any more."""

    def __init__(self, memory: Tensor, shape: tuple[int, ...]) -> None:
        self._memory, self._shape = memory, shape

    def _pixels(self) -> Tensor:
        return self._memory[: math.prod(self._shape)].view(self._shape)

    def copy(self) -> Tensor:
        """The pixels in memory of this process."""
        # numpy asks for huge pages, which torch does not: this is several times faster than `clone`.
        return torch.from_numpy(np.copy(self._pixels().numpy()))

    def pin_memory(self) -> Tensor:
        """The pixels in pinned memory; called by the thread of torch's DataLoader that pins batches."""
        return self._pixels().pin_memory()

    def __del__(self) -> None:
        self._memory[-1] = 0


class Arena:
    """Memory for the pixels of one batch, given out piece after piece; what does not fit gets memory of its own."""

    def __init__(self, size: int = 0, slot: _Slot | None = None) -> None:
        """
        Args:
            size: in bytes, without a slot.
            slot: shared memory to use instead.
        """
        self._slot = slot
        self._bytes: NDArray[np.uint8] = np.empty(size, np.uint8) if slot is None else slot.memory.numpy()[:-1]
        self.needed = 0  # bytes that were asked for

    def allocate(self, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        """Memory for pixels, uint8 [*shape], not initialised."""
        start, self.needed = self.needed, self.needed + math.prod(shape)
        if self.needed > len(self._bytes):
            return np.empty(shape, np.uint8)
        return self._bytes[start : self.needed].reshape(shape)

    def join(self, parts: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
        """Arrays of one shape, stacked; without a copy if they are what was allocated, in order."""
        size = parts[0].nbytes
        expected = range(_address(self._bytes), _address(self._bytes) + self.needed, max(1, size))
        if size * len(parts) == self.needed <= len(self._bytes) and [*map(_address, parts)] == list(expected):
            return self._bytes[: self.needed].reshape(len(parts), *parts[0].shape)
        return np.stack(parts)

    def hand_over(self, pixels: NDArray[np.uint8]) -> Tensor | Parcel:
        """The pixels as what is sent to the training process; without loading processes, a tensor of the same memory."""
        if self._slot is not None and pixels.size and _address(pixels) == _address(self._bytes):
            return Parcel(self._slot.memory, pixels.shape)
        return share(torch.from_numpy(pixels))


def _address(array: NDArray[np.uint8]) -> int:
    return int(array.__array_interface__["data"][0])


class BatchMemory:
    """Gives each batch of this process an arena of the size that the batches so far have needed."""

    def __init__(self) -> None:
        self._slots: list[_Slot] = []
        self._size = 0  # bytes

    def open(self) -> Arena:
        """The arena of the next batch; empty for the first one, whose size is not known.

        Raises:
            MemoryError: shared memory is full.
        """
        if not self._size or not is_loading_process():
            return Arena(self._size)
        # Those that have become too small go as soon as the training process has read them, too.
        self._slots = [slot for slot in self._slots if slot.size >= self._size]
        free = next((slot for slot in self._slots if slot.is_free), None)
        if free is None:
            free = _Slot(self._size)
            self._slots.append(free)
        return Arena(slot=free)

    def close(self, arena: Arena) -> None:
        """Note how much a batch has needed."""
        if arena.needed > self._size:
            self._size = arena.needed * 9 // 8  # batches of JPEGs, or of crops, differ in size


def receive(value: Any) -> Any:
    """The same nested dicts, with all pixels that loading processes have sent as tensors of this process."""
    if isinstance(value, dict):
        return {name: receive(part) for name, part in value.items()}
    return value.copy() if isinstance(value, Received) else value
