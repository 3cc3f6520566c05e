"""Something-Something V2 (Goyal et al., 2017): people act out 174 templates with objects of their choice."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stm.datasets.annotations import AnnotatedClip
from stm.datasets.official_lists import Annotations, Benchmark, Entry, Settings, Typical, make_entries, text_of
from stm.datasets.text_files import BadRow

_LISTS = {"train": "train.json", "val": "validation.json"}


def read(annotations: Annotations, settings: Settings) -> Iterator[Entry]:
    """Reads the training and validation lists; results are reported on the latter, and the test list is not used.

    The label is the template; the caption is the template with the video's objects filled in.
    """
    classes = set(annotations.json(_find(annotations, "labels.json"), dict))

    def make(row: Any, split: str) -> Entry:
        # labels.json contains the templates without the brackets around the placeholders.
        template = text_of(row, "template").replace("[", "").replace("]", "")
        if template not in classes:
            raise BadRow(f"the template {template!r} is not in labels.json")
        video = text_of(row, "id")
        return Entry(AnnotatedClip(f"{video}.webm", split, video, label=template, captions=(text_of(row, "label"),)))

    for split, name in _LISTS.items():
        yield from make_entries(split, annotations.json_rows(_find(annotations, name)), make)


def _find(annotations: Annotations, name: str) -> Path:
    """Find a list: the first release (20BN) prefixes each file name with the dataset's name, Qualcomm's does not."""
    return annotations.find(name, f"something-something-v2-{name}")


BENCHMARK = Benchmark(
    source="something-something-v2",
    title="Something-Something V2",
    # docs/DATASET.md of github.com/OpenGVLab/VideoMAEv2; the dataset's 220,847 include the 27,157 of the test list.
    counts={1: {"train": 168_913, "val": 24_777}},
    typical=Typical(48, 427, 240, "about 4 s at 12 frames/s, 240 pixels high; the width is assumed"),
    lists_from="https://developer.qualcomm.com/software/ai-datasets/something-something (the labels archive)",
    subfolders=("labels", "annotations"),
    read=read,
)
