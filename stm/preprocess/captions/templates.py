"""Captions that need no model: the manifest's own, and templates filled with the action label."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from stm.jobs.status import Status

WHOLE_CLIP = -1  # in place of a frame number


class ClipCaptions(NamedTuple):
    """What a source says about one clip."""

    texts: tuple[tuple[int, str], ...]  # (stored-frame number or WHOLE_CLIP, caption)
    status: Status
    detail: str = ""


def collect(pairs: Sequence[tuple[int, str | None]], nothing: Status) -> ClipCaptions:
    """Cleans captions: runs of white space become one space, empty ones are left out.

    Args:
        pairs: (stored-frame number or WHOLE_CLIP, caption).
        nothing: the status of a clip all of whose captions are empty.
    """
    cleaned = [(frame, " ".join((text or "").split())) for frame, text in pairs]
    good = tuple((frame, text) for frame, text in cleaned if text)
    empty = [_place(number, frame) for number, (frame, text) in enumerate(cleaned) if not text]
    detail = f"{len(empty)} of {len(pairs)} captions are empty: {', '.join(empty)}" if empty else ""
    return ClipCaptions(good, Status.OK if good else nothing, detail)


def _place(number: int, frame: int) -> str:
    return f"caption {number}" if frame == WHOLE_CLIP else f"stored frame {frame}"


def human_captions(row: Mapping[str, Any]) -> ClipCaptions:
    """The manifest's captions of a clip, in their order."""
    captions = row["captions"]
    if not captions:
        return ClipCaptions((), Status.CAPTION_MISSING, "the manifest has no caption for this clip")
    return collect([(WHOLE_CLIP, text) for text in captions], Status.CAPTION_EMPTY)


def spoken_label(row: Mapping[str, Any]) -> str:
    """`playing_guitar` -> `playing guitar`; empty when the clip has no label."""
    return " ".join((row["label"] or "").replace("_", " ").split())


NO_LABEL = ClipCaptions((), Status.CAPTION_MISSING, "the manifest has no label for this clip")


def label_captions(row: Mapping[str, Any], templates: Sequence[str]) -> ClipCaptions:
    """The templates with the clip's label in place of `{}`, in their order."""
    label = spoken_label(row)
    if not label:
        return NO_LABEL
    return collect([(WHOLE_CLIP, template.replace("{}", label)) for template in templates], Status.CAPTION_EMPTY)
