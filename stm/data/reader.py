"""Reading members of shards: a tar is opened once in a process, and only the needed bytes are read."""

import io
import os
import resource
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from stm.data.index import Clip
from stm.files import read_member


class ShardReader:
    """Open tars, by path. May be copied to a worker process, where it opens its own."""

    def __init__(self) -> None:
        self._open: OrderedDict[Path, int] = OrderedDict()
        # Half of what the system lets a process open; a thousand shards may be more than that.
        self._most = max(8, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)

    def __reduce__(self) -> tuple[type["ShardReader"], tuple[()]]:
        return ShardReader, ()  # descriptors mean nothing in another process

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
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{clip.tar}: clip {clip.key!r} cannot be read: {error}. Run the stage `shards` again"
            ) from error

    def frames(self, clip: Clip, positions: Iterable[int]) -> dict[int, NDArray[np.uint8]]:
        """Decoded frames, uint8 [height, width, 3] (red, green, blue), by position; each is decoded once.

        Raises:
            ValueError: the tar is torn, a frame is no JPEG, or it has another size than the index says.
        """
        return {position: self._frame(clip, position) for position in sorted(set(positions))}

    def _frame(self, clip: Clip, position: int) -> NDArray[np.uint8]:
        data = self._read(clip, int(clip.offsets[position]), int(clip.sizes[position]))
        where = f"{clip.tar}: frame {position} of clip {clip.key!r}"
        try:
            pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, colorspace="RGB")
        except ValueError as error:
            raise ValueError(
                f"{where} is not a JPEG that can be decoded ({error}). Run the stage `shards` again"
            ) from error
        if pixels.shape[:2] != (clip.height, clip.width):
            shown = f"{pixels.shape[1]}x{pixels.shape[0]}"
            raise ValueError(
                f"{where} has {shown} pixels, and {clip.width}x{clip.height} in the index: mixed up files?"
            )
        return pixels

    def similarity(self, clip: Clip, caption: int, frames: Sequence[int]) -> NDArray[np.float16]:
        """Similarity of one caption to some frames, ascending, float16 [frames, rows, columns]."""
        first, last = int(frames[0]), int(frames[-1])
        block = self._layers(clip, "similarity", caption * clip.frames + first, last - first + 1)
        return block[np.asarray(frames) - first]

    def motion(self, clip: Clip, first: int, last: int) -> NDArray[np.float16]:
        """Motion of the frames from `first` to `last`, both included, float16 [frames, rows, columns, 3]."""
        return self._layers(clip, "motion", first, last - first + 1)

    def _layers(self, clip: Clip, guide: str, first: int, count: int) -> NDArray[np.float16]:
        """`count` frames of a map from number `first`, captions one after the other; only these are read."""
        offset, size = clip.maps[guide]
        shape = clip.map_shape(guide)
        layer = shape[2:] if guide == "similarity" else shape[1:]
        header = size - 2 * int(np.prod(shape))
        _check_header(self._read(clip, offset, header), shape, f"{clip.tar}: {guide} map of clip {clip.key!r}")
        each = 2 * int(np.prod(layer))
        data = self._read(clip, offset + header + first * each, count * each)
        return np.frombuffer(data, dtype="<f2").reshape(count, *layer)


def _check_header(header: bytes, shape: tuple[int, ...], where: str) -> None:
    file = io.BytesIO(header)
    try:
        version = np.lib.format.read_magic(file)
        if version != (1, 0):
            raise ValueError(f"version {version}")
        found = np.lib.format.read_array_header_1_0(file)
    except ValueError as error:
        raise ValueError(f"{where} is no .npy file that can be read ({error}). Run the stage `shards` again") from error
    if found != (shape, False, np.dtype("<f2")):
        raise ValueError(
            f"{where} is {found[0]} {found[2]}, and {shape} float16 is expected. Run the stage `shards` again"
        )
