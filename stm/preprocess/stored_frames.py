"""Stored frames as pixels."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import simplejpeg

from stm.preprocess.frames.table import read_jpegs
from stm.storage.tables import DamagedError


def load_frame(
    frames_tar: Path, row: Mapping[str, Any], number: int, colours: Literal["RGB", "GRAY"] = "RGB"
) -> np.ndarray:
    """One stored frame of a clip: uint8 [H, W, 3], RGB.

    Args:
        row: the clip's row of the frames index.
        colours: `GRAY` gives the JPEG's own brightness, [H, W, 1].

    Raises:
        DamagedError: the tar is damaged or does not belong to the index. The frames stage has checked every frame that it
            wrote, so this is no bad clip but a bad file, and stops the job.
    """
    place = f"{frames_tar}: clip {row['video_id']!r}, stored frame {number}"
    data = read_jpegs(frames_tar, row, [number])[0]
    try:
        frame = simplejpeg.decode_jpeg(data, colorspace=colours)
    except ValueError as error:
        raise DamagedError(
            f"{place}: not a readable JPEG ({error}). Remove the tar and its index and run again"
        ) from error
    if frame.shape[:2] != (row["height"], row["width"]):
        raise DamagedError(
            f"{place}: is {frame.shape[1]} x {frame.shape[0]} pixels, the index says {row['width']} x {row['height']}; "
            "tar and index do not belong together. Remove both and run again"
        )
    return frame
