"""Kinetics-400 (Kay et al., 2017): ten-second clips of YouTube videos, identified by video id, start and end time."""

from collections.abc import Iterator
from typing import Any

from stm.datasets.annotations import AnnotatedClip
from stm.datasets.official_lists import (
    Annotations,
    Benchmark,
    Entry,
    Settings,
    Typical,
    integer_of,
    make_entries,
    text_of,
)

_LISTS = {"train": ("train",), "val": ("val", "validate", "validation")}
# CVDF's archives contain about 1,400 corrupt files; this folder contains replacements with the same names.
_REPLACED = "replacement_for_corrupted_k400"


def read(annotations: Annotations, settings: Settings) -> Iterator[Entry]:
    """Reads the training and validation lists; results are reported on the latter, and the test list is not used."""
    for split, stems in _LISTS.items():
        names = [form.format(stem) for stem in stems for form in ("{}.csv", "kinetics_{}.csv", "kinetics-400_{}.csv")]
        path = annotations.find(*names)
        rows = annotations.csv(path, ("label", "youtube_id", "time_start", "time_end"))
        yield from make_entries(split, rows, _make)


def _make(row: Any, split: str) -> Entry:
    youtube_id, label = text_of(row, "youtube_id"), text_of(row, "label")
    start, end = integer_of(row, "time_start"), integer_of(row, "time_end")
    video = f"{youtube_id}_{start:06d}_{end:06d}"
    clip = AnnotatedClip(path=f"{video}.mp4", split=split, video_id=video, label=label)
    # Some copies use the id alone as the file name; it is unique.
    return Entry(clip, other_names=(f"{youtube_id}_{start}_{end}", youtube_id), folders=(_REPLACED, split, label))


BENCHMARK = Benchmark(
    source="kinetics-400",
    title="Kinetics-400",
    # Numbers of rows in the lists that CVDF hosts: arrange_by_classes.py and issue 51 of
    # github.com/cvdfoundation/kinetics-dataset. (test.csv has 39,805.)
    counts={1: {"train": 246_534, "val": 19_906}},
    typical=Typical(
        300,
        340,
        256,
        "10 s (the paper) at an assumed 30 frames/s, with the short side at 256 pixels; originals are larger",
    ),
    lists_from=(
        "https://s3.amazonaws.com/kinetics/400/annotations/train.csv and val.csv (CVDF). DeepMind's later releases leave "
        "out videos that were removed from YouTube"
    ),
    subfolders=("annotations", "kinetics400"),
    read=read,
)
