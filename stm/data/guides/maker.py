"""The declaration that each guide module provides: how the guides of one packed array are computed and cropped."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from stm.data.crop_boxes import Box
from stm.data.geometry import Geometry
from stm.data.guides.crop import crop_map, pool_slots
from stm.shards.index import Clip


class Stored(NamedTuple):
    """The layers of a packed array that cover a window of a clip, for the whole frame."""

    values: NDArray[np.floating]  # [stored frames, *layer]; for flow [2, stored frames, *layer]
    taken: NDArray[np.int64]  # the window's frames, as positions among these stored frames, ascending
    step: int  # stored frames from one sampled frame to the next
    clip: Clip


class CropFunction(Protocol):
    """Crops the map of a window's frames."""

    def __call__(
        self, values: NDArray[np.floating], clip: Clip, box: Box, flip: bool, geometry: Geometry
    ) -> NDArray[np.float32]: ...


def cut_tokens(
    values: NDArray[np.floating], clip: Clip, box: Box, flip: bool, geometry: Geometry
) -> NDArray[np.float32]:
    """One score per token of the crop: [frames, rows, columns] on the whole frame -> float32 [slots, N]."""
    cropped = crop_map(values, (clip.width, clip.height), box, geometry.side, flip)
    return pool_slots(cropped, geometry.tubelet)


def cut_similarity(
    values: NDArray[np.floating], clip: Clip, box: Box, flip: bool, geometry: Geometry
) -> NDArray[np.float32]:
    """`cut_tokens` for similarity, whose values may belong to overlapping windows of cells."""
    cropped = crop_map(values, (clip.width, clip.height), box, geometry.side, flip, clip.similarity_window)
    return pool_slots(cropped, geometry.tubelet)


def take_frames(stored: Stored) -> NDArray[np.floating]:
    """The stored maps of the sampled frames, unchanged."""
    return stored.values[stored.taken]


@dataclass(frozen=True)
class GuideMaker:
    """How the guides of one packed array are computed: from its stored frames to the window's frames, then cropped."""

    # Maps each guide of the array to the function that computes its map for the window's frames, on the whole frame.
    make: Mapping[str, Callable[[Stored], NDArray[np.floating]]]
    cut: CropFunction = cut_tokens
    looks_back: bool = False  # whether it needs the `step` stored frames up to the window's first frame
