"""Captions without a model: those of the manifest, and templates filled with the action label."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from stm.jobs.status import Status

WHOLE_CLIP = -1  # in place of a frame number


class ClipCaptions(NamedTuple):
    """The captions of one clip from one source."""

    texts: tuple[tuple[int, str], ...]  # (stored-frame number or WHOLE_CLIP, caption)
    status: Status
    detail: str = ""


def collect(pairs: Sequence[tuple[int, str | None]], empty_status: Status) -> ClipCaptions:
    """Clean captions: collapse white space, and leave out empty captions.

    Args:
        pairs: (stored-frame number or WHOLE_CLIP, caption).
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
    """The captions of a clip from the manifest, in their order; `row` is its row of the slice."""
    captions = row["captions"]
    if not captions:
        return ClipCaptions((), Status.CAPTION_MISSING, "the manifest has no caption for this clip")
    return collect([(WHOLE_CLIP, text) for text in captions], Status.CAPTION_EMPTY)


def label_text(row: Mapping[str, Any]) -> str:
    """The clip's label as words, `playing guitar` for `playing_guitar`; empty if the clip has no label."""
    return " ".join((row["label"] or "").replace("_", " ").split())


NO_LABEL = ClipCaptions((), Status.CAPTION_MISSING, "the manifest has no label for this clip")


def label_captions(row: Mapping[str, Any], templates: Sequence[str]) -> ClipCaptions:
    """Fill each template with the clip's label in place of `{}`, in the order of the templates."""
    # `str.format` would interpret other braces in a template or label.
    label = label_text(row)
    if not label:
        return NO_LABEL
    return collect([(WHOLE_CLIP, template.replace("{}", label)) for template in templates], Status.CAPTION_EMPTY)
