"""EPIC-KITCHENS-55 (Damen et al., 2018): labelled segments of long videos from head-mounted cameras."""

import re
from collections.abc import Iterator
from typing import Any

from stm.datasets.annotations import AnnotatedClip
from stm.datasets.folder import DatasetError
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
from stm.datasets.text_files import BadRow

# The labels of the two test sets were never published. Baradel et al. (ECCV 2018) train on participants 1 to 25 and
# validate on the others; the dataset's authors refer to this split (epic-kitchens-55-annotations, issue 17).
_LAST_TRAINING_PARTICIPANT = 25
_COLUMNS = ("uid", "participant_id", "video_id", "narration", "start_timestamp", "stop_timestamp")


def read(annotations: Annotations, settings: Settings) -> Iterator[Entry]:
    """Reads the segments of the training list. The label combines verb and noun class; the caption is the narration."""
    verbs = _classes(annotations, "EPIC_verb_classes.csv", "verb_id")
    nouns = _classes(annotations, "EPIC_noun_classes.csv", "noun_id")

    def make(row: Any, _: str) -> Entry:
        verb, noun = _look_up(verbs, integer_of(row, "verb_class")), _look_up(nouns, integer_of(row, "noun_class"))
        participant, video = text_of(row, "participant_id"), text_of(row, "video_id")
        start, end = seconds(text_of(row, "start_timestamp")), seconds(text_of(row, "stop_timestamp"))
        if start >= end:
            raise BadRow(f"must start before it ends, runs from {start} s to {end} s")
        clip = AnnotatedClip(
            path=f"{participant}/{video}.MP4",
            split=split_of(participant),
            video_id=f"{video}_{integer_of(row, 'uid')}",
            label={"verb": verb, "noun": noun}.get(settings.label, f"{verb} {noun}"),
            captions=(text_of(row, "narration"),),
            start=start,
            end=end,
        )
        return Entry(clip)

    rows = annotations.csv(annotations.find("EPIC_train_action_labels.csv"), (*_COLUMNS, "verb_class", "noun_class"))
    yield from make_entries("train", rows, make)


def _classes(annotations: Annotations, name: str, number: str) -> dict[int, str]:
    """Names by class index: `put-down` becomes `put down`, `board:chopping` becomes `chopping board`."""
    path = annotations.find(name)
    names = {}
    try:
        for _, row in annotations.csv(path, (number, "class_key")):
            key = text_of(row, "class_key")
            names[integer_of(row, number)] = " ".join(reversed(key.split(":"))).replace("-", " ")
    except BadRow as error:
        raise DatasetError(f"{path}: {error}; download it again, see docs/datasets.md") from error
    if len(set(names.values())) < len(names):
        raise DatasetError(f"{path}: lists a class twice; download it again, see docs/datasets.md")
    return names


def _look_up(names: dict[int, str], number: int) -> str:
    if number not in names:
        raise BadRow(f"there is no class {number}; the classes end at {max(names, default=-1)}")
    return names[number]


def split_of(participant: str) -> str:
    """`P07` -> `train`, `P28` -> `val`."""
    match = re.fullmatch(r"P(\d+)", participant)
    if match is None:
        raise BadRow(f"participant_id must be P and a number, is {participant!r}")
    return "train" if int(match[1]) <= _LAST_TRAINING_PARTICIPANT else "val"


def seconds(timestamp: str) -> float:
    """`00:01:02.30` -> 62.3."""
    match = re.fullmatch(r"(\d+):([0-5]?\d):([0-5]?\d(?:\.\d+)?)", timestamp)
    if match is None:
        raise BadRow(f"a timestamp must be HH:MM:SS.ss, is {timestamp!r}")
    # Rounded, so that the manifest contains 62.3 rather than 62.300000000000004.
    return round(int(match[1]) * 3600 + int(match[2]) * 60 + float(match[3]), 6)


BENCHMARK = Benchmark(
    source="epic-kitchens-55",
    title="EPIC-KITCHENS-55",
    # 28,472 in total. TRAIN.DATASET_SIZE and TEST.DATASET_SIZE of configs/epic_verb_r50_baseline.yaml in
    # github.com/facebookresearch/video-long-term-feature-banks, which uses the same split.
    counts={1: {"train": 23_191, "val": 5_281}},
    typical=Typical(
        222, 1920, 1080, "mean segment 3.7 s at 59.94 frames/s, 1920 x 1080 (the paper and the annotations' readme)"
    ),
    lists_from="https://github.com/epic-kitchens/epic-kitchens-55-annotations",
    subfolders=("epic-kitchens-55-annotations", "annotations"),
    read=read,
)
