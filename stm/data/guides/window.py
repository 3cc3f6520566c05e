"""The guides of one window of a clip: read once for the whole frame, then cropped for each sample."""

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from stm.data.crop_boxes import Box
from stm.data.geometry import Geometry
from stm.data.guides.flow import FLOW
from stm.data.guides.maker import GuideMaker, Stored, cut_similarity, take_frames
from stm.data.guides.motion import MOTION
from stm.shards.index import Clip
from stm.shards.schema import ARRAYS, PackedArray, guide_arrays

# Arrays whose guides are more than the stored values, one per cell, or are cropped differently. All arrays are listed in
# `stm.shards.schema.ARRAYS`.
MAKERS: dict[str, GuideMaker] = {
    "flow": FLOW,
    "motion": MOTION,
    "similarity": GuideMaker({"similarity": take_frames}, cut=cut_similarity),
}

# Guides that are never packed: a method computes them from the pixels with its teacher (UMT, ClusterSTM) or mask (STM).
COMPUTED = ("attention", "features", "spatiotemporal")

Maps = dict[str, NDArray[np.floating]]


class ArrayReader(Protocol):
    """Reads layers of a clip's packed arrays, as `stm.shards.reader.ShardReader` does."""

    def layers(self, clip: Clip, name: str, first: int, last: int, *, outer: int | None = None) -> NDArray[Any]: ...


def maker_of(array: PackedArray) -> GuideMaker:
    """How an array's guides are computed; by default, each is the stored map of the sampled frames."""
    return MAKERS.get(array.name) or GuideMaker(dict.fromkeys(array.guides, take_frames))


def read_maps(
    reader: ArrayReader,
    clip: Clip,
    guides: tuple[str, ...],
    window: NDArray[np.int64],
    geometry: Geometry,
    caption: int | None = None,
) -> Maps:
    """Read the whole-frame maps of a window's frames that the given guides need.

    Args:
        window: positions of the sampled frames among the stored ones, ascending.
        caption: index of a caption of the clip: return only the maps that depend on it. None: only the other maps.

    Returns:
        "similarity", "motion", "motion_compensated" [frames, rows, columns]; "flow" [2, frames, R, C, 2], in map cells.
    """
    maps: Maps = {}
    first, last = int(window[0]), int(window[-1])
    step = geometry.step(clip.frames)
    for array in ARRAYS.values():
        needed = [guide for guide in array.guides if guide in guides]
        if not needed or array.per_source != (caption is not None):
            continue
        maker = maker_of(array)
        start = max(0, first - step + 1) if maker.looks_back else first
        # Reads only the layers of the stored frames that the window spans.
        values = reader.layers(clip, array.name, start, last, outer=caption)
        stored = Stored(values, window - start, step, clip)
        maps |= {guide: maker.make[guide](stored) for guide in needed}
    return maps


def cut_maps(maps: Maps, clip: Clip, box: Box, flip: bool, geometry: Geometry) -> dict[str, NDArray[np.float32]]:
    """Crop whole-frame maps to the guides of a sample: flow float32 [2, T, R, C, 2] in tokens, all others [slots, N]."""
    arrays = guide_arrays()
    return {guide: maker_of(arrays[guide]).cut(values, clip, box, flip, geometry) for guide, values in maps.items()}
