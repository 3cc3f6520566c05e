"""Checksums of the parts of a shard that are read on their own: a frame's JPEG, and a few layers of an array.

A loader reads 16 of a clip's frames and those layers of its arrays, so that the hash of a whole member would cost more than
the read. CRC-32 notices every change of up to 32 neighbouring bits and all but one in 4e9 of others, at gigabytes per second.
"""

import math
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from stm.shards.schema import PackedArray

# Layers of an array that share a checksum. A window of 16 frames spans up to three groups; an index of 1,000,000 clips with a
# checksum of each layer would be twice as large in memory.
GROUP = 8


def checksum(data: bytes | memoryview) -> int:
    """The CRC-32 of some bytes, as an unsigned integer."""
    return zlib.crc32(data)


def count_checksums(array: PackedArray, sizes: Mapping[str, Any]) -> Any:
    """The number of checksums of an array: one of its header, and one per group of layers, in the order of the file.

    Args:
        sizes: the sizes that determine the array's shape: integers, or int64 [clips] for many clips at once.
    """
    return 1 + -(-math.prod(array.count_layers(sizes)) // GROUP)


def array_checksums(member: bytes, array: PackedArray, shape: tuple[int, ...]) -> list[int]:
    """The checksums of an array's `.npy` file, see `count_checksums`."""
    values = array.dtype.itemsize * math.prod(shape)
    layer = array.dtype.itemsize * math.prod(shape[len(array.layers) :])
    view = memoryview(member)
    header = len(member) - values
    return [checksum(view[:header]), *(checksum(group) for group in split_groups(view[header:], layer))]


def split_groups(values: memoryview, layer: int) -> Iterator[memoryview]:
    """The groups of consecutive layers, of `layer` bytes each; the last group may be smaller."""
    for start in range(0, len(values), GROUP * layer):
        yield values[start : start + GROUP * layer]


def matches_groups(values: bytes, layer: int, expected: np.ndarray) -> bool:
    """Whether whole groups of layers have the expected checksums, uint32 [groups]."""
    found = [checksum(group) for group in split_groups(memoryview(values), layer)]
    return found == expected.tolist()


def enclosing_groups(first: int, count: int, layers: int) -> tuple[int, int]:
    """The first layer, and the one after the last, of the groups around `count` layers from index `first` on.

    Args:
        layers: the number of layers of the array.
    """
    return first // GROUP * GROUP, min(-(-(first + count) // GROUP) * GROUP, layers)
