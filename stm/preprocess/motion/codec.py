"""The codec's motion vectors, normalised to the displacement of the content from one frame to the next, per cell.

For each predicted block, a decoder reports the position in a reference frame that it was copied from. The distance to
the reference varies, so raw vectors are not comparable (measured on a pan of 4 pixels per frame: 8, 12 or 16 pixels in
P-frames with x264's defaults). Vectors are therefore divided by the distance, in frames, to their reference: the
previous I- or P-frame for vectors into the past, the next one for vectors of B-frames into the future.
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

# Codecs whose ffmpeg decoders export motion vectors; those of HEVC, VP8, VP9 and AV1 ignore the option.
EXPORTING_CODECS = frozenset(
    {
        *("h264", "mpeg4", "mpeg1video", "mpeg2video", "h261", "h263", "h263i", "h263p", "flv1"),
        *("msmpeg4v1", "msmpeg4v2", "msmpeg4v3", "wmv1", "wmv2", "rv10", "rv20"),
    }
)
# MPEG-4 part 2 reports zero vectors for blocks in direct mode, whatever the motion, so its B-frames carry no
# information and are treated like I-frames.
_NO_B_VECTORS = frozenset(["mpeg4"])

# Frames are processed in batches, because numpy's call overhead exceeds the work for a single frame. With more blocks
# than this, the arrays no longer fit in the CPU cache.
_BLOCKS_PER_BATCH = 2**14
_FRAMES_PER_BATCH = 64
_FIELDS = ("source", "w", "h", "dst_x", "dst_y", "motion_x", "motion_y", "motion_scale")  # fields used


@dataclass(frozen=True)
class Field:
    """Motion of one decoded frame relative to the previous one, in the coded orientation."""

    index: int  # decode order within the clip; -1: outside the clip
    vector: NDArray[np.float32]  # [rows, columns, 2] displacement of the content in cells, x right, y down
    covered: NDArray[np.float32]  # [rows, columns] fraction of the cell's area whose motion is known, 0 to 1


@dataclass(frozen=True)
class _PendingFrame:
    """A frame whose vectors into the future can be scaled once the next I- or P-frame has been decoded."""

    index: int  # in the clip
    position: int  # in display order, counted over all decoded frames
    previous_anchor: int  # position of the I- or P-frame before it
    blocks: MotionVectors | None  # the decoder's records; None if it exported none
    size: tuple[int, int]  # width, height in pixels


@dataclass(frozen=True)
class _ResolvedFrame:
    """A frame whose reference frames are known on both sides."""

    pending: _PendingFrame
    next_anchor: int | None  # position of the I- or P-frame after it; None if the stream ends first

    @property
    def distances(self) -> tuple[int, int]:
        """Return the distances, in frames, to the previous and the next I- or P-frame; 0 if unknown."""
        position = self.pending.position
        ahead = 0 if self.next_anchor is None else self.next_anchor - position
        return position - self.pending.previous_anchor, ahead


def read_fields(
    frames: Iterable[DecodedFrame], codec: str, rows: int, columns: int, origin: tuple[int, int] = (0, 0)
) -> Iterator[Field]:
    """Yield one field per frame of the clip, in order; each is yielded after the next I- or P-frame is decoded.

    Args:
        frames: frames of a `Video` opened with `vectors` and read with `surroundings`, because the first frames of a
            clip need the I- or P-frame before the clip.
        codec: ffmpeg's name for the codec.
        rows, columns: size of the map over the frame in its coded orientation, in cells.
        origin: x and y of the frame's first pixel in the coded frame, from which positions of blocks are counted.
    """
    batch: list[_ResolvedFrame] = []
    for resolved in _resolve(frames, codec):
        inside, size = resolved.pending.index >= 0, resolved.pending.size
        if batch and (_is_full(batch) or not inside or size != batch[0].pending.size):
            yield from _make_fields(batch, rows, columns, origin)
            batch = []
        if inside:
            batch.append(resolved)
    if batch:
        yield from _make_fields(batch, rows, columns, origin)


def _is_full(batch: Sequence[_ResolvedFrame]) -> bool:
    blocks = sum(len(r.pending.blocks) for r in batch if r.pending.blocks is not None)
    return len(batch) >= _FRAMES_PER_BATCH or blocks >= _BLOCKS_PER_BATCH


def _resolve(frames: Iterable[DecodedFrame], codec: str) -> Iterator[_ResolvedFrame]:
    """Yield each frame, in order, once the I- or P-frame after it has been decoded."""
    pending: list[_PendingFrame] = []
    anchor = 0
    for position, frame in enumerate(frames):
        image = frame.image
        blocks: Any = image.side_data.get("MOTION_VECTORS")
        bidirectional = image.pict_type in (PictureType.B, PictureType.BI)
        if image.pict_type == PictureType.B and codec in _NO_B_VECTORS:
            blocks = None
        pending.append(_PendingFrame(frame.index, position, anchor, blocks, (image.width, image.height)))
        if bidirectional:
            continue
        yield from (_ResolvedFrame(entry, position) for entry in pending)
        pending, anchor = [], position
    yield from (_ResolvedFrame(entry, None) for entry in pending)  # the stream ends with B-frames


def _make_fields(batch: Sequence[_ResolvedFrame], rows: int, columns: int, origin: tuple[int, int]) -> Iterator[Field]:
    """Yield the area-weighted mean of all vectors in each cell, both past and future; all frames have the same size."""
    blocks, frame = _join([r.pending.blocks for r in batch])
    back, ahead = np.array([r.distances for r in batch]).T
    past = blocks["source"] < 0
    steps = np.where(past, back[frame], np.where(blocks["source"] > 0, -ahead[frame], 0))
    # Vectors without a known distance cannot be scaled: their area counts as unknown.
    if not steps.all():
        known = steps != 0
        blocks, frame, past, steps = blocks[known], frame[known], past[known], steps[known]
    # A vector points to where the block came from, so the content moved in the opposite direction; for a source in the
    # future, `steps` is negative and reverses the direction again.
    scale = -1.0 / (blocks["motion_scale"].astype(np.float64) * steps)
    width, height = batch[0].pending.size
    x = blocks["motion_x"] * scale * (columns / width)
    y = blocks["motion_y"] * scale * (rows / height)
    area = past.astype(np.float64)
    shape = (len(batch), rows, columns)
    sums = sum_over_cells(blocks, [x, y, area, 1.0 - area], frame, width, height, shape, origin)
    total = sums[2] + sums[3]
    vector = (sums[:2] / np.where(total > 0, total, 1.0)).astype(np.float32)
    # A bidirectional block has a vector in each direction, but its area counts only once.
    covered = np.minimum(np.maximum(sums[2], sums[3]), 1.0).astype(np.float32)
    for resolved, motion, known_share in zip(batch, np.moveaxis(vector, 0, -1), covered, strict=True):
        yield Field(resolved.pending.index, motion, known_share)


def _join(parts: Sequence[MotionVectors | None]) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Concatenate the records of several frames; also return, per record, the index of its frame in `parts`."""
    counts = [0 if part is None else len(part) for part in parts]
    present: list[Any] = [part for part in parts if part is not None and len(part)]
    if not present:
        empty = np.zeros(0, [(name, np.int32) for name in _FIELDS])
        return empty, np.zeros(0, np.int64)
    # Concatenate as bytes, because numpy joins records field by field, and PyAV creates a new dtype for each frame.
    raw = np.concatenate([np.frombuffer(part, np.uint8) for part in present])
    joined = raw.view(present[0].to_ndarray().dtype)
    return joined, np.repeat(np.arange(len(parts)), counts)


def sum_over_cells(
    blocks: NDArray[Any],
    values: Sequence[NDArray[np.float64]],
    frame: NDArray[np.integer],
    width: int,
    height: int,
    shape: tuple[int, int, int],
    origin: tuple[int, int] = (0, 0),
) -> NDArray[np.float64]:
    """Sum, for each cell, the value of each block times the fraction of the cell's area that the block covers.

    Args:
        blocks: the decoder's records: centre and size in pixels; areas outside the frame are clipped.
        values: arrays of one value per block, [blocks] each.
        frame: index of the frame of each block, [blocks].
        width, height: size of the frames, in pixels.
        shape: frames, rows, columns.
        origin: x and y of the frame's first pixel, in the coordinates of the blocks.

    Returns:
        float64 [values, frames, rows, columns].
    """
    frames, rows, columns = shape
    top, vertical = _spread(blocks["dst_y"] - origin[1], blocks["h"], height, rows)
    left, horizontal = _spread(blocks["dst_x"] - origin[0], blocks["w"], width, columns)
    # Padded with rows and columns after the last ones, where all shares are zero, but whose indices must exist.
    padded_rows, padded_columns = rows + len(vertical), columns + len(horizontal)
    first = (frame * padded_rows + top) * padded_columns + left
    sums = np.zeros((len(values), frames * padded_rows * padded_columns))
    for down, row_share in enumerate(vertical):
        for across, column_share in enumerate(horizontal):
            cell, share = first + (down * padded_columns + across), row_share * column_share
            for total, value in zip(sums, values, strict=True):
                # `bincount`, because many blocks overlap one cell and `+=` would add only one of them.
                total += np.bincount(cell, weights=share * value, minlength=len(total))
    return sums.reshape(-1, frames, padded_rows, padded_columns)[:, :, :rows, :columns]


def _spread(
    centre: NDArray[Any], size: NDArray[Any], length: int, cells: int
) -> tuple[NDArray[np.int64], list[NDArray[np.float64]]]:
    """Return, along one axis, each block's first overlapped cell, and the covered fractions of it and the next ones."""
    if not len(size):
        return np.zeros(0, np.int64), []
    largest = int(size.max())
    first, shares = _share_table(length, cells, largest)
    # Centres are whole pixels: for a block of even size, the first pixel of its second half.
    start = np.clip(centre - (size // 2), -largest, length).astype(np.int64)
    index = (start + largest) * (largest + 1) + size
    return first[index], [share[index] for share in shares]


@lru_cache(maxsize=64)
def _share_table(length: int, cells: int, largest: int) -> tuple[NDArray[np.int64], list[NDArray[np.float64]]]:
    """Tabulate `_spread` for all starts from -largest and all sizes up to `largest`: many blocks share combinations."""
    start, size = np.arange(-largest, length + 1)[:, None], np.arange(largest + 1)
    begin, end = np.clip(start, 0, length), np.clip(start + size, 0, length)
    first = np.broadcast_to(np.minimum(begin * cells // length, cells - 1), end.shape)
    most = -(-largest * cells // length) + 1  # one more, because a block may begin inside a cell
    edges = np.append(cell_edges(length, cells), np.full(most, length))  # cells after the last one are empty
    shares = [
        np.maximum(np.minimum(end, edges[first + n + 1]) - np.maximum(begin, edges[first + n]), 0.0) * (cells / length)
        for n in range(most)
    ]
    return first.ravel(), [share.ravel() for share in shares]
