"""HMDB51 (Kuehne et al., 2011): 6,766 clips of 51 actions, three official splits of 70 and 30 clips per class."""

from collections.abc import Iterator

from stm.datasets.annotations import AnnotatedClip
from stm.datasets.official_lists import Annotations, Benchmark, Entry, Settings, Typical, make_entries
from stm.datasets.text_files import BadRow

_SPLITS = {"1": "train", "2": "test"}
_UNUSED = "0"  # a few clips of each class are in neither split


def read(annotations: Annotations, settings: Settings) -> Iterator[Entry]:
    """Reads one file per class (`brush_hair_test_split1.txt`); each line is a file name and 1, 2 or 0 (readme)."""
    ending = f"_test_split{settings.fold}.txt"
    for path in annotations.find_all(f"*{ending}"):
        action = path.name.removesuffix(ending)
        # File names contain spaces and special characters, so only the last word is split off.
        rows = [(where, line.rpartition(" ")) for where, line in annotations.lines(path)]
        used = [(where, (action, name.strip(), flag)) for where, (name, _, flag) in rows if flag != _UNUSED]
        yield from make_entries("train", used, _make)


def _make(row: tuple[str, str, str], _: str) -> Entry:
    action, name, flag = row
    if flag not in _SPLITS or not name:
        raise BadRow(f"must be a file's name and 0, 1 or 2, is {f'{name} {flag}'!r}")
    # The class is part of the id, because file names may not be unique across classes.
    video = f"{action}/{name.rpartition('.')[0]}"
    clip = AnnotatedClip(f"{action}/{name}", _SPLITS[flag], video, label=action.replace("_", " "))
    return Entry(clip, folders=(action,))


BENCHMARK = Benchmark(
    source="hmdb51",
    title="HMDB51",
    counts={fold: {"train": 51 * 70, "test": 51 * 30} for fold in (1, 2, 3)},  # the paper, section 3
    typical=Typical(95, 320, 240, "30 frames/s, 240 pixels high (the paper); about 3 s and the width are assumed"),
    lists_from="https://serre-lab.clps.brown.edu/resource/hmdb-a-large-human-motion-database (test_train_splits.rar)",
    subfolders=("testTrainMulti_7030_splits", "test_train_splits/testTrainMulti_7030_splits", "annotations"),
    read=read,
)
