"""Recognises the annotation files of the datasets' own releases, which people have under the names of the shared lists."""

from collections.abc import Mapping
from typing import Any

# Keys of an entry of a list, and whose format has them.
_ENTRIES: tuple[tuple[frozenset[str], str], ...] = (
    (frozenset({"description", "times"}), "DiDeMo's own release (moments of videos, with one entry per description)"),
    (frozenset({"question_id", "video_name"}), "ActivityNet-QA's own release (its questions)"),
    (frozenset({"question_id", "answer", "type"}), "ActivityNet-QA's own release (its answers)"),
    (frozenset({"question", "answer", "video_id"}), "MSRVTT-QA's and MSVD-QA's own release"),
    (frozenset({"id", "template", "placeholders"}), "Something-Something V2's own release"),
)
# Keys of an object.
_OBJECTS: tuple[tuple[frozenset[str], str], ...] = (
    (frozenset({"videos", "sentences"}), "MSR-VTT's own release (for `msrvtt-captioning`)"),
    (frozenset({"images", "annotations"}), "COCO's captions, in which some archives hold MSR-VTT's"),
    (frozenset({"database", "taxonomy"}), "ActivityNet's own release (classes, without captions)"),
)
_CAPTIONS_OF_ACTIVITYNET = frozenset({"timestamps", "sentences"})


def recognise_release(value: Any) -> str:
    """Whose format a JSON file has that should be a shared list; empty if it may be one.

    Args:
        value: the contents of the file.
    """
    if isinstance(value, list):
        keys = _keys_of(value[0]) if value else frozenset()
        is_shared = bool(keys & {"video", "image"}) and bool(keys & {"caption", "question"})
        return "" if is_shared else _first(keys, _ENTRIES)
    if isinstance(value, Mapping) and value and _keys_of(next(iter(value.values()))) >= _CAPTIONS_OF_ACTIVITYNET:
        return "ActivityNet Captions' own release"
    return _first(_keys_of(value), _OBJECTS)


def _keys_of(value: Any) -> frozenset[str]:
    return frozenset(value) if isinstance(value, Mapping) else frozenset()


def _first(keys: frozenset[str], formats: tuple[tuple[frozenset[str], str], ...]) -> str:
    return next((name for wanted, name in formats if keys >= wanted), "")
