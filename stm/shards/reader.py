"""Reads members of shards: each process opens a tar once, reads only the bytes that it needs, and checks all that it reads."""

import hashlib
import io
import math
import os
import resource
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from tarfile import BLOCKSIZE
from tokenize import TokenError
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from stm.shards.checksums import GROUP, checksum, enclosing_groups, matches_groups
from stm.shards.index import Clip
from stm.shards.schema import ARRAYS
from stm.storage.tables import DamagedError
from stm.storage.tars import read_member


class ShardReader:
    """Reads from tars, which it keeps open. A copy in a worker process opens its own files.

    Args:
        kept_gigabytes: memory for a cache of decoded frames, filled in reading order and never evicted; meant for datasets
            that fit into it. Each loading process has its own cache.
    """

    def __init__(self, kept_gigabytes: float = 0.0) -> None:
        self._kept_gigabytes = kept_gigabytes
        self._room = kept_gigabytes * 1e9  # bytes
        self._kept: dict[tuple[str, int], NDArray[np.uint8]] = {}
        self._open: OrderedDict[Path, int] = OrderedDict()
        # Half of the process's limit of open files: a dataset may have more shards than that.
        self._max_open = max(8, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)

    def __reduce__(self) -> tuple[type["ShardReader"], tuple[float]]:
        return ShardReader, (self._kept_gigabytes,)  # file descriptors are not valid in a different process

    def _descriptor(self, tar: Path) -> int:
        if tar not in self._open:
            if len(self._open) >= self._max_open:
                os.close(self._open.popitem(last=False)[1])
            self._open[tar] = os.open(tar, os.O_RDONLY)
        # The least recently used tar is the first entry and is closed first.
        self._open.move_to_end(tar)
        return self._open[tar]

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def __del__(self) -> None:
        self.close()

    def _read(self, clip: Clip, offset: int, size: int) -> bytes:
        try:
            return read_member(self._descriptor(clip.tar), offset, size)
        except (FileNotFoundError, ValueError) as error:
            raise DamagedError(
                f"{clip.tar}: clip {clip.key!r} cannot be read: {error}; remove the tar and its index and run again"
            ) from error
        except OSError as error:
            # A disk or network error: the shard may be intact, and a restarted run may be able to read it.
            raise OSError(error.errno, f"clip {clip.key!r}: {error.strerror}", str(clip.tar)) from error

    def frames(self, clip: Clip, positions: Iterable[int]) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """Yield each distinct position, ascending, with its decoded frame, uint8 [height, width, 3] (RGB).

        A frame is valid only until the next one is decoded, which overwrites it: a single reused buffer stays in the CPU
        cache, which is too small for all frames of a clip.

        Raises:
            ValueError: the tar is truncated, a frame's bytes are not those that were packed, it is not a JPEG, or its size
                differs from the index.
        """
        pixels = np.empty((clip.height, clip.width, 3), dtype=np.uint8)
        wanted = sorted(set(positions))
        jpegs = self.jpegs(clip, [position for position in wanted if (clip.key, position) not in self._kept])
        for position in wanted:
            if (kept := self._kept.get((clip.key, position))) is not None:
                yield position, kept
                continue
            self._decode(clip, position, jpegs[position], pixels)
            if self._room >= pixels.nbytes:
                self._kept[clip.key, position] = pixels.copy()
                self._room -= pixels.nbytes
            yield position, pixels

    def jpegs(self, clip: Clip, positions: Iterable[int]) -> dict[int, memoryview]:
        """The JPEG of each distinct position, ascending, compared with its checksum.

        Raises:
            ValueError: the tar is truncated, or a frame's bytes are not those that were packed.
        """
        found = {}
        for run in _split_runs(clip, sorted(set(positions))):
            start = int(clip.offsets[run[0]])
            data = memoryview(self._read(clip, start, int(clip.offsets[run[-1]] + clip.sizes[run[-1]]) - start))
            for position in run:
                first = int(clip.offsets[position]) - start
                found[position] = jpeg = data[first : first + int(clip.sizes[position])]
                self._check_frame(clip, position, jpeg)
        return found

    def _check_frame(self, clip: Clip, position: int, jpeg: memoryview) -> None:
        if clip.sha256:
            intact = hashlib.sha256(jpeg).hexdigest() == clip.member_sha256(position)
        else:
            intact = checksum(jpeg) == clip.checksums[position]
        _check(intact, _name_frame(clip, position))

    def _decode(self, clip: Clip, position: int, jpeg: memoryview, place: NDArray[np.uint8]) -> None:
        where = _name_frame(clip, position)
        try:
            height, width, *_ = simplejpeg.decode_jpeg_header(jpeg)
            if (height, width) == place.shape[:2]:
                simplejpeg.decode_jpeg(jpeg, colorspace="RGB", buffer=place)
        except ValueError as error:
            raise DamagedError(
                f"{where} is not a JPEG that can be decoded ({error}); remove the tar and its index and run again"
            ) from error
        if (height, width) != place.shape[:2]:
            raise DamagedError(
                f"{where} has {width}x{height} pixels, and {clip.width}x{clip.height} in the index: were files mixed up?"
            )

    def layers(self, clip: Clip, name: str, first: int, last: int, *, outer: int | None = None) -> NDArray[Any]:
        """Layers `first` to `last`, both included, of one of a clip's arrays; only they and up to 14 neighbours are read.

        Args:
            name: name of an array that the clip has, see `stm.shards.schema.ARRAYS`.
            first, last: indices along the last of the dimensions that count layers: frames, or captions if the array has no
                frames.
            outer: index along the dimension before it, such as the caption; None: all indices.

        Returns:
            [last - first + 1, *layer] in the array's dtype; preceded by the outer dimension if the array has one and `outer`
            is None.

        Raises:
            ValueError: the tar is truncated, the bytes are not those that were packed, or the member is not the array that
                the index describes.
        """
        *before, inner = clip.count_layers(name)
        numbers = range(before[0] if before else 1) if outer is None else [outer]
        blocks = [self._block(clip, name, number * inner + first, last - first + 1) for number in numbers]
        return np.stack(blocks) if before and outer is None else blocks[0]

    def text(self, clip: Clip, captions: Sequence[int]) -> NDArray[np.float32]:
        """The unit text vectors of the given captions, float32 [captions, D]."""
        vectors = self.layers(clip, "text", 0, len(clip.captions) - 1)[list(captions)].astype(np.float32)
        # They are stored as float16, whose 11 bits preserve the length of 1 only to within 0.05 %.
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def _block(self, clip: Clip, name: str, first: int, count: int) -> NDArray[Any]:
        """`count` layers from index `first` on, with all layers counted consecutively: [count, *layer]."""
        declared = ARRAYS[name]
        offset, size = clip.arrays[name]
        shape = clip.array_shape(name)
        layers = math.prod(clip.count_layers(name))
        values = math.prod(shape) // layers  # per layer
        each = declared.dtype.itemsize * values
        header = size - each * layers
        # Whole groups of layers are read, because only these can be checked; without checksums, the whole array.
        start, stop = (0, layers) if clip.sha256 else enclosing_groups(first, count, layers)
        head = self._read(clip, offset, header)
        data = self._read(clip, offset + header + start * each, (stop - start) * each)
        where = f"{clip.tar}: {name} array of clip {clip.key!r}"
        if clip.sha256:
            _check(hashlib.sha256(head + data).hexdigest() == clip.member_sha256(name), where)
        else:
            expected = clip.array_checksums[name]
            groups = expected[1 + start // GROUP :][: -(-(stop - start) // GROUP)]
            _check(checksum(head) == expected[0] and matches_groups(data, each, groups), where)
        _check_header(head, shape, declared.dtype, where)
        taken = np.frombuffer(data, declared.dtype, count * values, (first - start) * each)
        return taken.reshape(count, *shape[len(declared.layers) :])


def _split_runs(clip: Clip, positions: Sequence[int]) -> list[list[int]]:
    """Ascending positions as runs of frames that lie side by side in the tar, each of which is one read."""
    runs: list[list[int]] = []
    end = None
    for position in positions:
        start = int(clip.offsets[position])
        # Between two members there are at most the padding of one and the header of the other.
        if end is not None and 0 <= start - end < 2 * BLOCKSIZE:
            runs[-1].append(position)
        else:
            runs.append([position])
        end = start + int(clip.sizes[position])
    return runs


def _name_frame(clip: Clip, position: int) -> str:
    return f"{clip.tar}: frame {position} of clip {clip.key!r}"


def _check(intact: bool, where: str) -> None:
    if not intact:
        raise DamagedError(
            f"{where} differs from its checksum in the index: it was changed or damaged after packing. Remove the tar and its "
            "index and run the stage `shards` again (`stm verify` checks all other members)"
        )


@cache
def _write_header(shape: tuple[int, ...], dtype: np.dtype[Any]) -> bytes:
    """The .npy header that numpy writes for an array."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype.str, "fortran_order": False, "shape": shape})
    return file.getvalue()


def _check_header(header: bytes, shape: tuple[int, ...], dtype: np.dtype[Any], where: str) -> None:
    if header == _write_header(shape, dtype):  # parsing the header would take longer than reading the array
        return
    file = io.BytesIO(header)
    try:
        version = np.lib.format.read_magic(file)
        if version != (1, 0):
            raise ValueError(f"version {version}")
        actual = np.lib.format.read_array_header_1_0(file)
    except (ValueError, SyntaxError, TokenError) as error:  # numpy parses the header as a Python literal
        raise DamagedError(
            f"{where} is not a .npy file that can be read ({error}); remove the tar and its index and run again"
        ) from error
    if actual != (shape, False, dtype):
        raise DamagedError(
            f"{where} is {actual[0]} {actual[2]}, and {shape} {dtype} is expected; remove the tar and its index and run again"
        )
