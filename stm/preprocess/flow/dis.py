"""Optical flow by OpenCV's DIS (Kroeger et al., ECCV 2016), one clip per worker process; does not import torch."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from stm.config import Flow
from stm.jobs.journal import Journal
from stm.preprocess.clip_outcomes import pack_record
from stm.preprocess.flow.cells import to_cells
from stm.preprocess.frames.table import load_frame
from stm.shards.grid import map_shape

_PRESETS = {
    "ultrafast": cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST,
    "fast": cv2.DISOPTICAL_FLOW_PRESET_FAST,
    "medium": cv2.DISOPTICAL_FLOW_PRESET_MEDIUM,
}


class FlowMaps(NamedTuple):
    """The flow of one clip with T stored frames, in map-cell widths and heights; x points right, y down."""

    forward: NDArray[np.float16]  # [T, rows, columns, 2] displacement of frame t's content to t + 1; 0 for the last
    backward: NDArray[np.float16]  # [T, rows, columns, 2] displacement of frame t's content to t - 1; 0 for the first


@dataclass(frozen=True)
class FlowTask:
    """One clip whose flow is to be estimated."""

    frames: Mapping[str, Any]  # the clip's row of the frames index
    tar: Path
    settings: Flow
    grid: int
    journal: Journal

    @property
    def name(self) -> str:
        """The clip's name in error messages."""
        return str(self.frames["video_id"])

    @property
    def item(self) -> str:
        """The clip's identifier in the journal; it changes when the stored pixels change."""
        return json.dumps([self.frames[name] for name in ("key", "width", "height", "sha256")])

    @property
    def map_shape(self) -> tuple[int, int]:
        """Rows and columns of the map, in cells."""
        return map_shape(self.frames["width"], self.frames["height"], self.grid)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the flow, in flow cells."""
        rows, columns = self.map_shape
        return rows * self.settings.cells, columns * self.settings.cells

    def empty(self) -> FlowMaps:
        """Return all-zero flow in the clip's shape."""
        shape = (self.frames["frames"], *self.shape, 2)
        return FlowMaps(np.zeros(shape, np.float16), np.zeros(shape, np.float16))

    def finish(self, maps: FlowMaps) -> None:
        """Write the clip's flow to the journal."""
        self.journal.put(self.item, pack_record({}, [], [part.tobytes() for part in maps]))


def extract_clip(task: FlowTask) -> None:
    """Estimate the flow of one clip in a worker process, and write it to the journal.

    Raises:
        DamagedError: the stored frames cannot be read.
    """
    cv2.setNumThreads(1)  # there is already one process per core, and a single thread always sums in the same order
    estimate: Any = cv2.DISOpticalFlow.create(_PRESETS[task.settings.preset])
    maps = task.empty()
    shape = (*task.map_shape, task.settings.cells)
    previous: NDArray[np.uint8] | None = None
    for number in range(task.frames["frames"]):
        frame = load_frame(task.tar, task.frames, number, "GRAY")[..., 0]
        if previous is not None:
            maps.forward[number - 1] = to_cells(estimate.calc(previous, frame, None), *shape)
            maps.backward[number] = to_cells(estimate.calc(frame, previous, None), *shape)
        previous = frame
    task.finish(maps)
