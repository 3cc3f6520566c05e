"""The status of a clip after a stage, and the policies that a config can set per status."""

from enum import StrEnum
from typing import Literal

Policy = Literal["keep", "drop", "fail"]


class Status(StrEnum):
    """The outcome of a stage for one clip. The list is complete: every possible outcome has a code."""

    OK = "ok"
    # Manifest
    BAD_ROW = "bad_row"  # an unusable annotation row
    DUPLICATE_ID = "duplicate_id"
    PATH_OUTSIDE_ROOT = "path_outside_root"
    MISSING_FILE = "missing_file"
    EMPTY_FILE = "empty_file"
    OPEN_FAILED = "open_failed"  # not a container that ffmpeg can read
    NO_VIDEO_STREAM = "no_video_stream"
    TOO_SMALL = "too_small"
    # Decoding
    TRUNCATED = "truncated"  # decoding ended early; the frames decoded so far are intact
    CORRUPT_FRAMES = "corrupt_frames"  # the decoder marked frames as damaged
    TOO_SHORT = "too_short"
    EDIT_LIST = "edit_list"  # the container hides some of the coded frames
    VARIABLE_RATE = "variable_rate"
    SIZE_CHANGES = "size_changes"  # the shape of the frames changes within the clip; those after it are not stored
    TIMEOUT = "timeout"
    CRASHED = "crashed"  # the decoder crashed its process
    # Captions, similarity, motion
    CAPTION_MISSING = "caption_missing"  # the source has no caption for this clip
    CAPTION_EMPTY = "caption_empty"
    CAPTION_FAILED = "caption_failed"
    UNSUPPORTED_MOTION = "unsupported_motion"  # the codec exports no motion vectors

    @property
    def default_policy(self) -> Policy:
        """The policy that applies if the config does not set one."""
        return "keep" if self in _KEPT_BY_DEFAULT else "drop"


# Statuses of clips whose decoded frames are usable for training, although the file has defects.
_KEPT_BY_DEFAULT = {Status.OK, Status.TRUNCATED, Status.CORRUPT_FRAMES, Status.EDIT_LIST, Status.VARIABLE_RATE}
