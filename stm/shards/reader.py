"""Reading members of shards: a tar is opened once in a process, and only the needed bytes are read."""

import io
import math
import os
import resource
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from tokenize import TokenError

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from stm.shards.index import Clip
from stm.storage.tables import DamagedError
from stm.storage.tars import read_member

# Dimensions that number a map's layers, one after the other in the file: captions and frames, or directions and frames.
LEADING = {"similarity": 2, "motion": 1, "flow": 2, "text": 1}


class ShardReader:
    """Open tars, by path. May be copied to a worker process, where it opens its own.

    Args:
        kept_gigabytes: memory for decoded frames, which are kept as they come until it is full. For data that fits; each
            loading process keeps its own.
    """

    def __init__(self, kept_gigabytes: float = 0.0) -> None:
        self._kept_gigabytes, self._room = kept_gigabytes, kept_gigabytes * 1e9
        self._kept: dict[tuple[str, int], NDArray[np.uint8]] = {}
        self._open: OrderedDict[Path, int] = OrderedDict()
        # Half of what the system lets a process open; a thousand shards may be more than that.
        self._most = max(8, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)

    def __reduce__(self) -> tuple[type["ShardReader"], tuple[float]]:
        return ShardReader, (self._kept_gigabytes,)  # descriptors mean nothing in another process

    def _descriptor(self, tar: Path) -> int:
        if tar not in self._open:
            if len(self._open) >= self._most:
                os.close(self._open.popitem(last=False)[1])
            self._open[tar] = os.open(tar, os.O_RDONLY)
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
                f"{clip.tar}: clip {clip.key!r} cannot be read: {error}. Run the stage `shards` again"
            ) from error
        except OSError as error:
            # Of the disk or the network: the shard may be in order, and a run that is started again may read it.
            raise OSError(error.errno, f"clip {clip.key!r}: {error.strerror}", str(clip.tar)) from error

    def frames(self, clip: Clip, positions: Iterable[int]) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """Positions, ascending and each once, with the decoded frame there, uint8 [height, width, 3] (red, green, blue).

        A frame is good until the next one is asked for, which takes its place in memory: a clip's frames together do not
        fit into a processor's cache.

        Raises:
            ValueError: the tar is torn, a frame is no JPEG, or it has another size than the index says.
        """
        pixels = np.empty((clip.height, clip.width, 3), dtype=np.uint8)
        for position in sorted(set(positions)):
            if (kept := self._kept.get((clip.key, position))) is not None:
                yield position, kept
                continue
            self._decode(clip, position, pixels)
            if self._room >= pixels.nbytes:
                self._kept[clip.key, position] = pixels.copy()
                self._room -= pixels.nbytes
            yield position, pixels

    def _decode(self, clip: Clip, position: int, place: NDArray[np.uint8]) -> None:
        data = self._read(clip, int(clip.offsets[position]), int(clip.sizes[position]))
        where = f"{clip.tar}: frame {position} of clip {clip.key!r}"
        try:
            height, width, *_ = simplejpeg.decode_jpeg_header(data)
            if (height, width) == place.shape[:2]:
                simplejpeg.decode_jpeg(data, colorspace="RGB", buffer=place)
        except ValueError as error:
            raise DamagedError(
                f"{where} is not a JPEG that can be decoded ({error}). Run the stage `shards` again"
            ) from error
        if (height, width) != place.shape[:2]:
            raise DamagedError(
                f"{where} has {width}x{height} pixels, and {clip.width}x{clip.height} in the index: mixed up files?"
            )

    def similarity(self, clip: Clip, caption: int, frames: Sequence[int]) -> NDArray[np.float16]:
        """Similarity of one caption to some frames, ascending, float16 [frames, rows, columns]."""
        first, last = int(frames[0]), int(frames[-1])
        block = self._layers(clip, "similarity", caption * clip.frames + first, last - first + 1)
        return block[np.asarray(frames) - first]

    def motion(self, clip: Clip, first: int, last: int) -> NDArray[np.float16]:
        """Motion of the frames from `first` to `last`, both included, float16 [frames, rows, columns, 3]."""
        return self._layers(clip, "motion", first, last - first + 1)

    def flow(self, clip: Clip, first: int, last: int) -> NDArray[np.float16]:
        """Forward and backward flow of the frames from `first` to `last`, float16 [2, frames, R, C, 2], in map cells."""
        count = last - first + 1
        return np.stack([self._layers(clip, "flow", start + first, count) for start in (0, clip.frames)])

    def text(self, clip: Clip, captions: Sequence[int]) -> NDArray[np.float32]:
        """The captions' text vectors, float32 [captions, D], of unit length."""
        vectors = self._layers(clip, "text", 0, len(clip.captions))[list(captions)].astype(np.float32)
        # They are stored with 11 bits: their length is 1 to within 0.05 % only.
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def _layers(self, clip: Clip, name: str, first: int, count: int) -> NDArray[np.float16]:
        """`count` layers of a map from number `first`, such as frames; only these are read."""
        offset, size = clip.maps[name]
        shape = clip.map_shape(name)
        layer = shape[LEADING[name] :]
        header = size - 2 * math.prod(shape)
        _check_header(self._read(clip, offset, header), shape, f"{clip.tar}: {name} map of clip {clip.key!r}")
        each = 2 * math.prod(layer)
        data = self._read(clip, offset + header + first * each, count * each)
        return np.frombuffer(data, dtype="<f2").reshape(count, *layer)


@cache
def _write_header(shape: tuple[int, ...]) -> bytes:
    """The header that numpy writes for float16 of a shape."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f2", "fortran_order": False, "shape": shape})
    return file.getvalue()


def _check_header(header: bytes, shape: tuple[int, ...], where: str) -> None:
    if header == _write_header(shape):  # parsing it takes longer than reading the map
        return
    file = io.BytesIO(header)
    try:
        version = np.lib.format.read_magic(file)
        if version != (1, 0):
            raise ValueError(f"version {version}")
        found = np.lib.format.read_array_header_1_0(file)
    except (ValueError, SyntaxError, TokenError) as error:  # numpy reads the header as it would a program
        raise DamagedError(
            f"{where} is no .npy file that can be read ({error}). Run the stage `shards` again"
        ) from error
    if found != (shape, False, np.dtype("<f2")):
        raise DamagedError(
            f"{where} is {found[0]} {found[2]}, and {shape} float16 is expected. Run the stage `shards` again"
        )
