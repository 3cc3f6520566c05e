"""EPIC-KITCHENS-55: segments of long videos, a split by participants, three kinds of labels."""

from pathlib import Path

import pytest
from benchmark_copies import EPIC_HEADER, Copy, make_copy

from stm.datasets import DatasetError
from stm.datasets.actions import check_benchmark, read_benchmark
from stm.datasets.actions.epic_kitchens import seconds, split_of
from stm.datasets.text_files import BadRow
from stm.jobs.status import Status


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Copy:
    return make_copy("epic-kitchens-55", tmp_path, monkeypatch)


def test_segments_have_times_classes_and_narrations(copy: Copy) -> None:
    clips = [named.clip for named in read_benchmark(copy.dataset).clips]
    assert [(clip.video_id, clip.split, clip.start, clip.end, clip.label, clip.captions[0]) for clip in clips] == [
        ("P01_01_0", "train", 0.14, 3.37, "open cupboard", "open door"),
        ("P01_01_45", "train", 250.05, 257.87, "pour courgette", "pour courgette onto pan"),
        ("P22_05_24001", "train", 3659.5, 3662.25, "put chopping board", "put board, gently"),
        ("P31_14_39236", "val", 310.86, 312.08, "close cupboard", "close door"),
    ]
    assert [clip.path for clip in clips[:2]] == ["P01/P01_01.MP4"] * 2


@pytest.mark.parametrize(
    ("label", "expected"),
    [("verb", ["open", "pour", "put", "close"]), ("noun", ["cupboard", "courgette", "chopping board", "cupboard"])],
)
def test_verbs_or_nouns_alone(copy: Copy, label: str, expected: list[str]) -> None:
    clips = read_benchmark(copy.with_(label=label)).clips
    assert [named.clip.label for named in clips] == expected


def test_a_missing_video_is_counted_with_its_segments(copy: Copy) -> None:
    copy.files[0].unlink()
    with pytest.raises(
        DatasetError, match=r"2 clips have no file\. The first of 1 missing files:\n  P01/P01_01\.MP4 \(2 clips\)"
    ):
        check_benchmark(copy.dataset)


def test_the_split_is_by_participant() -> None:
    splits = {f"P{number:02d}": split_of(f"P{number:02d}") for number in range(1, 33)}
    assert [name for name, split in splits.items() if split == "val"] == [f"P{number}" for number in range(26, 33)]
    with pytest.raises(BadRow, match="'Q1'"):
        split_of("Q1")


@pytest.mark.parametrize("text", ["1:2", "00:61:00.0", "00:00:60", "-1:00:00", "00:00:01,5", "00:00:nan", ""])
def test_odd_timestamps_are_refused(text: str) -> None:
    with pytest.raises(BadRow, match="HH:MM:SS"):
        seconds(text)


def test_timestamps_are_exact_to_the_microsecond() -> None:
    assert seconds("00:01:02.30") == 62.3 and seconds("01:00:00") == 3600.0 and seconds("10:59:59.999") == 39599.999


def test_bad_segments_are_refused_one_by_one(copy: Copy) -> None:
    rows = [
        "1,P01,P01_01,x,00:00:02.00,00:00:01.00,1,2,open,2,door,8,['door'],[8]",  # ends before it starts
        "2,P01,P01_01,x,00:00:00.00,00:00:01.00,1,2,fly,125,door,8,['door'],[8]",  # no such verb
        "3,P01,P01_01,wait,00:08:45.83,00:09:01.44,1,2,wait-for,,rice,44,['rice'],[44]",  # of the invalid labels
        "4,P01,P01_01,x,00:00:00.00,00:00:01.00,1,2,open,2,door,8,['door'],[8]",
    ]
    (copy.annotations / "EPIC_train_action_labels.csv").write_text(EPIC_HEADER + "\n".join(rows))
    found = read_benchmark(copy.dataset)
    assert [named.video_id for named in found.clips] == ["P01_01_4"]
    assert [one.status for one in found.refused] == [Status.BAD_ROW] * 3
    details = [one.detail for one in found.refused]
    assert "line 2: must start before it ends" in details[0] and "no class 125" in details[1]
    assert "verb_class" in details[2]


def test_two_classes_of_one_name_are_an_error(copy: Copy) -> None:
    (copy.annotations / "EPIC_noun_classes.csv").write_text("noun_id,class_key,nouns\n1,dust pan,[]\n2,pan:dust,[]\n")
    with pytest.raises(DatasetError, match="lists a class twice"):
        read_benchmark(copy.dataset)
