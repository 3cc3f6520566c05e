"""Captions that need no model: those from the manifest, and templates filled with the action label."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from stm.jobs.status import Status

WHOLE_CLIP = -1  # used instead of a frame index


class ClipCaptions(NamedTuple):
    """The captions of one clip from one source."""

    texts: tuple[tuple[int, str], ...]  # (stored-frame index or WHOLE_CLIP, caption)
    status: Status
    detail: str = ""


def collect(pairs: Sequence[tuple[int, str | None]], empty_status: Status) -> ClipCaptions:
    """Clean captions: collapse whitespace and drop empty captions.

    Args:
        pairs: (stored-frame index or WHOLE_CLIP, caption).
        empty_status: the status of a clip whose captions are all empty.
    """
    cleaned = [(frame, " ".join((text or "").split())) for frame, text in pairs]
    texts = tuple((frame, text) for frame, text in cleaned if text)
    empty = [_place(number, frame) for number, (frame, text) in enumerate(cleaned) if not text]
    detail = f"{len(empty)} of {len(pairs)} captions are empty: {', '.join(empty)}" if empty else ""
    return ClipCaptions(texts, Status.OK if texts else empty_status, detail)


def _place(number: int, frame: int) -> str:
    return f"caption {number}" if frame == WHOLE_CLIP else f"stored frame {frame}"


def human_captions(row: Mapping[str, Any]) -> ClipCaptions:
    """Return a clip's captions from the manifest, in order; `row` is its row of the slice."""
    captions = row["captions"]
    if not captions:
        return ClipCaptions((), Status.CAPTION_MISSING, "the manifest has no caption for this clip")
    return collect([(WHOLE_CLIP, text) for text in captions], Status.CAPTION_EMPTY)


def label_text(row: Mapping[str, Any]) -> str:
    """Return the clip's label as words, such as `playing guitar` for `playing_guitar`; empty if it has no label."""
    return " ".join((row["label"] or "").replace("_", " ").split())


NO_LABEL = ClipCaptions((), Status.CAPTION_MISSING, "the manifest has no label for this clip")


def label_captions(row: Mapping[str, Any], templates: Sequence[str]) -> ClipCaptions:
    """Fill each template, in order, by replacing `{}` with the clip's label."""
    # `str.format` would interpret other braces in a template or label.
    label = label_text(row)
    if not label:
        return NO_LABEL
    return collect([(WHOLE_CLIP, template.replace("{}", label)) for template in templates], Status.CAPTION_EMPTY)
