"""How a clip's work ended: one closed list of codes for all stages, and what the config may do about each."""

from enum import StrEnum
from typing import Literal

Policy = Literal["keep", "drop", "fail"]


class Status(StrEnum):
    """How a clip ended a stage. The list is closed: everything that can happen to a clip has its code here."""

    OK = "ok"
    # the manifest
    BAD_ROW = "bad_row"  # an annotation row that cannot be used
    DUPLICATE_ID = "duplicate_id"
    PATH_OUTSIDE_ROOT = "path_outside_root"
    MISSING_FILE = "missing_file"
    EMPTY_FILE = "empty_file"
    OPEN_FAILED = "open_failed"  # no container that ffmpeg knows
    NO_VIDEO_STREAM = "no_video_stream"
    TOO_SMALL = "too_small"
    # decoding
    TRUNCATED = "truncated"  # decoding ended early; the frames before are good
    CORRUPT_FRAMES = "corrupt_frames"  # the decoder marked frames as damaged
    TOO_SHORT = "too_short"
    EDIT_LIST = "edit_list"  # the container hides some of the coded frames
    VARIABLE_RATE = "variable_rate"
    TIMEOUT = "timeout"
    CRASHED = "crashed"  # the decoder took its process down
    # captions, similarity, motion
    CAPTION_MISSING = "caption_missing"  # the source has none for this clip
    CAPTION_EMPTY = "caption_empty"
    CAPTION_FAILED = "caption_failed"
    UNSUPPORTED_MOTION = "unsupported_motion"  # the codec exports no motion vectors

    @property
    def default_policy(self) -> Policy:
        return "keep" if self in _KEPT else "drop"


_KEPT = {Status.OK, Status.TRUNCATED, Status.CORRUPT_FRAMES, Status.EDIT_LIST, Status.VARIABLE_RATE}
