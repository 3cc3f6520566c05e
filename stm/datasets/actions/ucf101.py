"""UCF101 (Soomro et al., 2012): 13,320 clips of 101 actions, three official splits."""

import re
from collections.abc import Iterator

from stm.datasets.annotations import AnnotatedClip
from stm.datasets.official_lists import Annotations, Benchmark, Entry, Settings, Typical, make_entries
from stm.datasets.text_files import BadRow


def read(annotations: Annotations, settings: Settings) -> Iterator[Entry]:
    """Reads both lists of a split. Lines: `ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1`; test lists omit the 1."""
    lines = annotations.lines(annotations.find("classInd.txt"))
    classes = {_official_class(line.split()[-1]) for _, line in lines}

    def make(line: str, split: str) -> Entry:
        path = line.split()[0]
        folders, _, file = path.rpartition("/")
        folder = folders.rpartition("/")[2]
        action = _official_class(folder)
        if action not in classes:
            raise BadRow(f"the class {folder!r} is not in classInd.txt")
        clip = AnnotatedClip(path, split, video_id=_official_name(file), label=spell_out(action))
        return Entry(clip, folders=(folder,))

    for split in ("train", "test"):
        lines = annotations.lines(annotations.find(f"{split}list{settings.fold:02d}.txt"))
        yield from make_entries(split, lines, make)


# The official lists spell one class in two ways, `HandstandPushups/v_HandStandPushups_g01_c01.avi`, and some copies spell
# both in the one way or the other: ids and labels must not depend on it.
_CLASS, _FILE = "HandstandPushups", "v_HandStandPushups_"


def _official_class(name: str) -> str:
    return _CLASS if name.lower() == _CLASS.lower() else name


def _official_name(file: str) -> str:
    """A file's name without its ending, in the official spelling."""
    name = file.rpartition(".")[0]
    return _FILE + name[len(_FILE) :] if name.lower().startswith(_FILE.lower()) else name


def spell_out(name: str) -> str:
    """`ApplyEyeMakeup` -> `apply eye makeup`."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower()


BENCHMARK = Benchmark(
    source="ucf101",
    title="UCF101",
    # Numbers of lines in the lists, as asserted by the tests of public code. Each split contains all 13,320 clips.
    counts={
        1: {"train": 9_537, "test": 3_783},
        2: {"train": 9_586, "test": 3_734},
        3: {"train": 9_624, "test": 3_696},
    },
    typical=Typical(180, 320, 240, "mean 7.21 s at 25 frames/s, 320 x 240 (the paper)"),
    lists_from="https://www.crcv.ucf.edu/data/UCF101.php (UCF101TrainTestSplits-RecognitionTask.zip)",
    subfolders=("ucfTrainTestlist", "annotations"),
    read=read,
)
