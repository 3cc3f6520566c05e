"""The codec's own motion vectors, made comparable: displacement of the content from one frame to the next, per cell.

A decoder says, for each block that it predicted, where in another frame it was copied from. How far that other
frame is away differs from frame to frame, so a raw vector says little (measured on a pan of 4 pixels a frame: 8,
12 or 16 pixels in the P-frames of x264's defaults). Here vectors are divided by the distance to the frame that
they point to: the previous I- or P-frame for the past, the next one for B-frames' vectors into the future.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from av.video.frame import PictureType
from numpy.typing import NDArray

from stm.preprocess.grid import cell_edges
from stm.preprocess.video import DecodedFrame

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
    blocks: NDArray[Any] | None  # the decoder's records; None when it gave none
    size: tuple[int, int]  # width, height of the picture


def read_fields(frames: Iterable[DecodedFrame], codec: str, rows: int, columns: int) -> Iterator[Field]:
    """Yields one field a frame, in order; `frames` must come from a `Video` that was asked for `vectors`.

    Args:
        frames: with `surroundings`, so that the first frames of a clip know the I- or P-frame before them.
        codec: ffmpeg's name of the coding.
        rows, columns: cells over the picture as it is coded.
    """
    waiting: list[_Waiting] = []
    anchor = 0
    for place, frame in enumerate(frames):
        picture = frame.picture
        data = picture.side_data.get("MOTION_VECTORS")
        kind = picture.pict_type
        silent = data is None or (kind == PictureType.B and codec in _SILENT_B)
        blocks = None if data is None or silent else data.to_ndarray()
        waiting.append(_Waiting(frame.index, place, anchor, blocks, (picture.width, picture.height)))
        if kind in (PictureType.B, PictureType.BI):
            continue
        for entry in waiting:
            yield _make_field(entry, place, rows, columns)
        waiting, anchor = [], place
    for entry in waiting:  # the stream ends in B-frames: their future is not known
        yield _make_field(entry, None, rows, columns)


def _make_field(entry: _Waiting, future: int | None, rows: int, columns: int) -> Field:
    """The area-weighted mean of all vectors in each cell, past and future alike."""
    if entry.blocks is None:
        empty = np.zeros((rows, columns), np.float32)
        return Field(entry.frame, np.zeros((rows, columns, 2), np.float32), empty)
    distances = {-1: entry.place - entry.past, 1: 0 if future is None else future - entry.place}
    blocks = entry.blocks
    steps = np.select([blocks["source"] < 0, blocks["source"] > 0], [distances[-1], -distances[1]], 0)
    blocks, steps = blocks[steps != 0], steps[steps != 0]
    # A vector points to where the block came from, so the content moved the other way; a future source, again.
    scale = -1.0 / (blocks["motion_scale"].astype(np.float64) * steps)
    width, height = entry.size
    x = blocks["motion_x"] * scale * (columns / width)
    y = blocks["motion_y"] * scale * (rows / height)
    past = blocks["source"] < 0
    sums = sum_over_cells(blocks, np.stack([x, y, past, ~past], axis=-1), width, height, rows, columns)
    total = sums[..., 2] + sums[..., 3]
    vector = sums[..., :2] / np.where(total > 0, total, 1.0)[..., None]
    # A block may have a vector each way: its area is known once all the same.
    covered = np.minimum(np.maximum(sums[..., 2], sums[..., 3]), 1.0)
    return Field(entry.frame, vector.astype(np.float32), covered.astype(np.float32))


def sum_over_cells(
    blocks: NDArray[Any], values: NDArray[np.float64], width: int, height: int, rows: int, columns: int
) -> NDArray[np.float64]:
    """For each cell, the sum over the blocks of value times the share of the cell's area that the block covers.

    Args:
        blocks: the decoder's records: centre and size in pixels; what lies outside the picture is cut off.
        values: [blocks, values].
        width, height: of the picture, in pixels.

    Returns:
        [rows, columns, values].
    """
    vertical = _overlap(blocks["dst_y"], blocks["h"], height, rows)
    horizontal = _overlap(blocks["dst_x"], blocks["w"], width, columns)
    weighted = horizontal[:, :, None] * values[:, None, :]
    return (vertical.T @ weighted.reshape(len(blocks), -1)).reshape(rows, columns, -1)


def _overlap(centre: NDArray[Any], size: NDArray[Any], length: int, cells: int) -> NDArray[np.float64]:
    """Overlap of each block with each cell along one axis, as a share of the cell: [blocks, cells]."""
    # Thousands of blocks lie in a few hundred places only.
    places, which = np.unique(centre.astype(np.int64) * 256 + size, return_inverse=True)
    # The centre is in whole pixels: of a block of even size, the first pixel of its second half.
    length_of, middle = places % 256, places // 256
    start = (middle - length_of // 2)[:, None]
    edges = cell_edges(length, cells)
    shared = np.minimum(start + length_of[:, None], edges[1:]) - np.maximum(start, edges[:-1])
    return (np.maximum(shared, 0.0) * (cells / length))[which]
