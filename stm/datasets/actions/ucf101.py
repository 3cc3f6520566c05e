"""UCF101 (Soomro et al., 2012): 13,320 clips of 101 actions, three official splits."""

import re
from collections.abc import Iterator

from stm.datasets.annotations import AnnotatedClip
from stm.datasets.official_lists import Annotations, Benchmark, Entry, Settings, Typical, make_entries
from stm.datasets.text_files import BadRow


def read(annotations: Annotations, settings: Settings) -> Iterator[Entry]:
    """Reads both lists of a split. Lines: `ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1`; test lists omit the 1."""
    classes = {line.split()[-1] for _, line in annotations.lines(annotations.find("classInd.txt"))}

    def make(line: str, split: str) -> Entry:
        path = line.split()[0]
        folders, _, file = path.rpartition("/")
        action = folders.rpartition("/")[2]
        if action not in classes:
            raise BadRow(f"the class {action!r} is not in classInd.txt")
        clip = AnnotatedClip(path, split, video_id=file.rpartition(".")[0], label=spell_out(action))
        return Entry(clip, folders=(action,))

    for split in ("train", "test"):
        lines = annotations.lines(annotations.find(f"{split}list{settings.fold:02d}.txt"))
        yield from make_entries(split, lines, make)


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
