"""Diving48 (Li et al., 2018), with the corrected labels of its second version: 48 kinds of dives."""

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

_POSITIONS = {"FREE": "free", "PIKE": "pike", "TUCK": "tuck", "STR": "straight"}


def read(annotations: Annotations, settings: Settings) -> Iterator[Entry]:
    """Reads both lists. Each file is one clip (`start_frame` is 0, `end_frame` its length), so neither is needed."""
    vocabulary = annotations.find("Diving48_vocab.json")
    classes = [name_dive(dive) for dive in annotations.json(vocabulary, list)]
    if len(set(classes)) < len(classes):
        raise DatasetError(f"{vocabulary}: lists a class twice; download it again, see docs/datasets.md")

    def make(row: Any, split: str) -> Entry:
        video, label = text_of(row, "vid_name"), integer_of(row, "label")
        if not 0 <= label < len(classes):
            raise BadRow(f"label {label} is not one of the {len(classes)} of Diving48_vocab.json")
        return Entry(AnnotatedClip(f"{video}.mp4", split, video, label=classes[label]))

    for split in ("train", "test"):
        rows = annotations.json_rows(annotations.find(f"Diving48_V2_{split}.json"))
        yield from make_entries(split, rows, make)


def name_dive(dive: Any) -> str:
    """`["Back", "15som", "05Twis", "FREE"]` -> `back dive, 1.5 somersaults, 0.5 twists, free position`."""
    if not isinstance(dive, list) or len(dive) != 4 or not all(isinstance(part, str) for part in dive):
        raise DatasetError(f"Diving48_vocab.json: a dive must be four words, is {dive!r}; is it the official file?")
    takeoff, somersaults, twists, position = dive
    # A "Dive" is half a somersault, because the diver enters the water head first.
    turns = "no somersault" if somersaults == "Dive" else _count(somersaults, "som", "somersault")
    spins = "no twist" if twists == "NoTwis" else _count(twists, "Twis", "twist")
    return f"{takeoff.lower()} dive, {turns}, {spins}, {_POSITIONS.get(position, position.lower())} position"


def _count(code: str, unit: str, word: str) -> str:
    """Spell out a count: `15som` is 1.5 and `1som` is 1; a final 5 after another digit means a half."""
    match = re.fullmatch(rf"(\d?)(\d){unit}", code)
    if match is None:
        return code.lower()
    number = f"{match[1]}.{match[2]}" if match[1] else match[2]
    return f"{number} {word}" if number == "1" else f"{number} {word}s"


BENCHMARK = Benchmark(
    source="diving48",
    title="Diving48 V2",
    # Reported by users of the two lists; the accuracies of MTEB's Diving48 V2 are integer multiples of 1/1970.
    counts={1: {"train": 15_027, "test": 1_970}},
    typical=Typical(
        157, 640, 480, "mean length and size in the metadata of one public copy; the size of others is assumed"
    ),
    lists_from=(
        "http://www.svcl.ucsd.edu/projects/resound/dataset.html (Diving48_V2_train.json, Diving48_V2_test.json, "
        "Diving48_vocab.json; the lists without V2 are the first version's)"
    ),
    subfolders=("annotations",),
    read=read,
)
