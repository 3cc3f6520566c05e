"""The codec's own motion vectors, made comparable: displacement of the content from one frame to the next, per cell.

A decoder says, for each block that it predicted, where in another frame it was copied from. How far that other
frame is away differs from frame to frame, so a raw vector says little (measured on a pan of 4 pixels a frame: 8,
12 or 16 pixels in the P-frames of x264's defaults). Here vectors are divided by the distance to the frame that
they point to: the previous I- or P-frame for the past, the next one for B-frames' vectors into the future.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from av.sidedata.motionvectors import MotionVectors
from av.video.frame import PictureType
from numpy.typing import NDArray

from stm.preprocess.video.reader import DecodedFrame
from stm.shards.grid import cell_edges

# Codings whose decoders export motion vectors. HEVC, VP8, VP9 and AV1 take the option and export nothing.
EXPORTING = frozenset(
    {
        *("h264", "mpeg4", "mpeg1video", "mpeg2video", "h261", "h263", "h263i", "h263p", "flv1"),
        *("msmpeg4v1", "msmpeg4v2", "msmpeg4v3", "wmv1", "wmv2", "rv10", "rv20"),
    }
)
# MPEG-4 part 2 leaves the vectors of directly predicted blocks at zero, whatever the motion: its B-frames say
# nothing, and are treated like I-frames.
_SILENT_B = frozenset(["mpeg4"])

# Frames are worked on together, because numpy takes longer to be called than to work on one of them. With more blocks
# than this the arrays leave the processor's cache.
_BLOCKS_A_BATCH = 2**14
_FRAMES_A_BATCH = 64
_FIELDS = ("source", "w", "h", "dst_x", "dst_y", "motion_x", "motion_y", "motion_scale")  # of a record, that are used


@dataclass(frozen=True)
class Field:
    """Motion of one decoded frame relative to the one before it, in the orientation in which it is coded."""

    index: int  # decode order within the clip; -1: not of the clip
    vector: NDArray[np.float32]  # [rows, columns, 2] in cells, x right, y down: displacement of the content
    covered: NDArray[np.float32]  # [rows, columns] share of the cell's area whose motion is known, 0 to 1


@dataclass(frozen=True)
class _Waiting:
    """A frame whose vectors into the future wait for the next I- or P-frame to come by."""

    frame: int  # its index in the clip
    place: int  # its place in display order
    past: int  # place of the I- or P-frame before it
    blocks: MotionVectors | None  # the decoder's records; None when it gave none
    size: tuple[int, int]  # width, height of the picture


@dataclass(frozen=True)
class _Ready:
    """A frame whose vectors have a known reach."""

    entry: _Waiting
    future: int | None  # place of the I- or P-frame after it; None: the stream ends before

    @property
    def distances(self) -> tuple[int, int]:
        """Frames back to the frame before, and on to the frame after, 0: not known."""
        place = self.entry.place
        return place - self.entry.past, 0 if self.future is None else self.future - place


def read_fields(frames: Iterable[DecodedFrame], codec: str, rows: int, columns: int) -> Iterator[Field]:
    """Yields one field for each frame of the clip, in order, some frames after it has come by.

    Args:
        frames: of a `Video` that was asked for `vectors`; with `surroundings`, so that the first frames of a clip know
            the I- or P-frame before them.
        codec: ffmpeg's name of the coding.
        rows, columns: cells over the picture as it is coded.
    """
    ready: list[_Ready] = []
    for entry in _resolve(frames, codec):
        inside, size = entry.entry.frame >= 0, entry.entry.size
        if ready and (_is_full(ready) or not inside or size != ready[0].entry.size):
            yield from _make_fields(ready, rows, columns)
            ready = []
        if inside:
            ready.append(entry)
    if ready:
        yield from _make_fields(ready, rows, columns)


def _is_full(ready: Sequence[_Ready]) -> bool:
    blocks = sum(len(r.entry.blocks) for r in ready if r.entry.blocks is not None)
    return len(ready) >= _FRAMES_A_BATCH or blocks >= _BLOCKS_A_BATCH


def _resolve(frames: Iterable[DecodedFrame], codec: str) -> Iterator[_Ready]:
    """Each frame, in order, once the I- or P-frame after it has come by."""
    waiting: list[_Waiting] = []
    anchor = 0
    for place, frame in enumerate(frames):
        picture = frame.picture
        blocks: Any = picture.side_data.get("MOTION_VECTORS")
        backward = picture.pict_type in (PictureType.B, PictureType.BI)
        if picture.pict_type == PictureType.B and codec in _SILENT_B:
            blocks = None
        waiting.append(_Waiting(frame.index, place, anchor, blocks, (picture.width, picture.height)))
        if backward:
            continue
        yield from (_Ready(entry, place) for entry in waiting)
        waiting, anchor = [], place
    yield from (_Ready(entry, None) for entry in waiting)  # the stream ends in B-frames


def _make_fields(ready: Sequence[_Ready], rows: int, columns: int) -> Iterator[Field]:
    """The area-weighted mean of all vectors in each cell, past and future alike; frames of one size."""
    blocks, frame = _join([r.entry.blocks for r in ready])
    back, ahead = np.array([r.distances for r in ready]).T
    past = blocks["source"] < 0
    steps = np.where(past, back[frame], np.where(blocks["source"] > 0, -ahead[frame], 0))
    if not steps.all():
        known = steps != 0
        blocks, frame, past, steps = blocks[known], frame[known], past[known], steps[known]
    # A vector points to where the block came from, so the content moved the other way; a future source, again.
    scale = -1.0 / (blocks["motion_scale"].astype(np.float64) * steps)
    width, height = ready[0].entry.size
    x = blocks["motion_x"] * scale * (columns / width)
    y = blocks["motion_y"] * scale * (rows / height)
    area = past.astype(np.float64)
    sums = sum_over_cells(blocks, [x, y, area, 1.0 - area], frame, width, height, (len(ready), rows, columns))
    total = sums[2] + sums[3]
    vector = (sums[:2] / np.where(total > 0, total, 1.0)).astype(np.float32)
    # A block may have a vector each way: its area is known once all the same.
    covered = np.minimum(np.maximum(sums[2], sums[3]), 1.0).astype(np.float32)
    for entry, moved, known_share in zip(ready, np.moveaxis(vector, 0, -1), covered, strict=True):
        yield Field(entry.entry.frame, moved, known_share)


def _join(parts: Sequence[MotionVectors | None]) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """The records of several frames, one after the other, and the number of the frame that each belongs to."""
    counts = [0 if part is None else len(part) for part in parts]
    some: list[Any] = [part for part in parts if part is not None and len(part)]
    if not some:
        empty = np.zeros(0, [(name, np.int32) for name in _FIELDS])
        return empty, np.zeros(0, np.int64)
    # As bytes, because numpy joins records field by field, and PyAV makes their type anew for each frame.
    joined = np.concatenate([np.frombuffer(part, np.uint8) for part in some]).view(some[0].to_ndarray().dtype)
    return joined, np.repeat(np.arange(len(parts)), counts)


def sum_over_cells(
    blocks: NDArray[Any],
    values: Sequence[NDArray[np.float64]],
    frame: NDArray[np.integer],
    width: int,
    height: int,
    shape: tuple[int, int, int],
) -> NDArray[np.float64]:
    """For each cell, the sum over the blocks of value times the share of the cell's area that the block covers.

    Args:
        blocks: the decoder's records: centre and size in pixels; what lies outside the picture is cut off.
        values: of the blocks, [blocks] each.
        frame: the number of the frame that each block belongs to, [blocks].
        width, height: of the pictures, in pixels.
        shape: frames, rows, columns.

    Returns:
        [values, frames, rows, columns].
    """
    frames, rows, columns = shape
    top, vertical = _spread(blocks["dst_y"], blocks["h"], height, rows)
    left, horizontal = _spread(blocks["dst_x"], blocks["w"], width, columns)
    # With a margin for the shares, all of them zero, that lie behind the last row and column.
    high, wide = rows + len(vertical), columns + len(horizontal)
    first = (frame * high + top) * wide + left
    sums = np.zeros((len(values), frames * high * wide))
    for down, tall in enumerate(vertical):
        for across, broad in enumerate(horizontal):
            cell, share = first + (down * wide + across), tall * broad
            for row, value in zip(sums, values, strict=True):
                row += np.bincount(cell, weights=share * value, minlength=len(row))
    return sums.reshape(-1, frames, high, wide)[:, :, :rows, :columns]


def _spread(
    centre: NDArray[Any], size: NDArray[Any], length: int, cells: int
) -> tuple[NDArray[np.int64], list[NDArray[np.float64]]]:
    """The first cell that each block lies on along one axis, and its shares of that cell and of those after it."""
    if not len(size):
        return np.zeros(0, np.int64), []
    largest = int(size.max())
    first, shares = _share_table(length, cells, largest)
    # The centre is in whole pixels: of a block of even size, the first pixel of its second half.
    start = np.clip(centre - (size // 2), -largest, length).astype(np.int64)
    place = (start + largest) * (largest + 1) + size
    return first[place], [share[place] for share in shares]


@lru_cache(maxsize=64)
def _share_table(length: int, cells: int, largest: int) -> tuple[NDArray[np.int64], list[NDArray[np.float64]]]:
    """`_spread` for every start, from -largest on, and every size up to the largest; thousands of blocks share a few."""
    start, size = np.arange(-largest, length + 1)[:, None], np.arange(largest + 1)
    begin, end = np.clip(start, 0, length), np.clip(start + size, 0, length)
    first = np.broadcast_to(np.minimum(begin * cells // length, cells - 1), end.shape)
    most = -(-largest * cells // length) + 1  # a block may begin and end inside a cell
    edges = np.append(cell_edges(length, cells), np.full(most, length))  # cells behind the last one are empty
    shares = [
        np.maximum(np.minimum(end, edges[first + n + 1]) - np.maximum(begin, edges[first + n]), 0.0) * (cells / length)
        for n in range(most)
    ]
    return first.ravel(), [share.ravel() for share in shares]
