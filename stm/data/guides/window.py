"""The guides of one window of a clip: read once for the whole frame, then cut for each crop."""

import numpy as np
from numpy.typing import NDArray

from stm.data.crop_boxes import Box
from stm.data.geometry import Geometry
from stm.data.guides.crop import crop_map, pool_slots
from stm.data.guides.flow import crop_flow, flow_between
from stm.data.guides.motion import compensate, motion_between
from stm.shards.index import Clip
from stm.shards.reader import ShardReader

# Guide -> the packed map that it is made of.
GUIDES = {"similarity": "similarity", "motion": "motion", "motion_compensated": "motion", "flow": "flow"}

# Guides that are never packed: a method makes them from the pixels, by its teacher (UMT, ClusterSTM) or its own mask (STM).
COMPUTED = ("attention", "features", "spatiotemporal")

Maps = dict[str, NDArray[np.floating]]


def read_maps(
    reader: ShardReader, clip: Clip, guides: tuple[str, ...], window: NDArray[np.int64], geometry: Geometry
) -> Maps:
    """The maps of a window's frames that do not depend on a caption, on the whole frame.

    Returns:
        "motion", "motion_compensated": float32 [frames, rows, columns]; "flow": float32 [2, frames, R, C, 2], in map cells.
    """
    maps: Maps = {}
    first, last = int(window[0]), int(window[-1])
    if "motion" in guides or "motion_compensated" in guides:
        step = geometry.step(clip.frames)
        start = max(0, first - step + 1)
        motion = reader.motion(clip, start, last)
        if "motion" in guides:
            maps["motion"] = motion_between(motion[..., 0], window - start, step)
        if "motion_compensated" in guides:
            maps["motion_compensated"] = motion_between(compensate(motion), window - start, step)
    if "flow" in guides:
        maps["flow"] = flow_between(reader.flow(clip, first, last), first, window, clip.flow_cells)
    return maps


def cut_maps(maps: Maps, clip: Clip, box: Box, flip: bool, geometry: Geometry) -> dict[str, NDArray[np.float32]]:
    """Maps of the whole frame as guides of a crop: flow float32 [2, T, R, C, 2] in tokens, all others [slots, N]."""
    frame, side = (clip.width, clip.height), geometry.side
    return {
        name: crop_flow(values, frame, box, side, clip.flow_cells, flip)
        if name == "flow"
        else pool_slots(crop_map(values, frame, box, side, flip), geometry.tubelet)
        for name, values in maps.items()
    }
