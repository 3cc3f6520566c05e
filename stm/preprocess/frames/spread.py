"""Which frames are stored of a clip of which a number is stored (`frames.count`)."""

from collections.abc import Mapping
from typing import Any

from stm.config import Frames

# The number of frames of a part of a video is its length times the frame rate, give or take one.
_MARGIN = 1


def spread_frames(decoded: int, count: int) -> list[int]:
    """Return the indices of the frames in the middle of `count` equal segments of a clip of `decoded` frames, ascending.

    Segment i spans [i, i + 1) * decoded / count; its middle lies in frame floor((i + 1/2) * decoded / count), which is TSN's
    frame of each segment in tests. A clip with fewer frames than segments has each of them once.
    """
    # Integer arithmetic, because floating-point rounding could move a middle into the previous frame.
    segments = range(count if decoded else 0)
    return sorted({(2 * segment + 1) * decoded // (2 * count) for segment in segments})


def choose_candidates(settings: Frames, row: Mapping[str, Any], decoded: int | None = None) -> frozenset[int] | None:
    """Return the indices of the frames that may have to be stored; None if those are every k-th.

    How many frames a clip has is known only once all are decoded: containers report wrong numbers. So that nearly all clips
    are read only once, the frames of the expected number are kept while reading, and those of its neighbours.

    Args:
        row: the clip's row of the manifest.
        decoded: the number of its frames, once it is known.
    """
    if settings.count is None:
        return None
    expected = _expect_frames(row) if decoded is None else decoded
    margin = _MARGIN if decoded is None else 0
    lengths = range(max(0, expected - margin), expected + margin + 1)
    return frozenset(index for length in lengths for index in spread_frames(length, settings.count))


def _expect_frames(row: Mapping[str, Any]) -> int:
    """Return the number of frames by the manifest; 0 if it does not say."""
    fps, start, end = row["fps"], row["start"], row["end"]
    if start is None and end is None and row["frames"]:
        return int(row["frames"])
    end = row["duration"] if end is None else end
    return max(0, round((end - (start or 0.0)) * fps)) if end and fps else 0
