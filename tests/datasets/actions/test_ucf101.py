"""UCF101: three splits, and one class in two spellings."""

from pathlib import Path

import pytest
from benchmark_copies import Copy, make_copy

from stm.datasets.actions import check_benchmark, read_benchmark
from stm.datasets.actions.ucf101 import spell_out
from stm.jobs.status import Status


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Copy:
    return make_copy("ucf101", tmp_path, monkeypatch)


def test_lines_of_both_lists(copy: Copy) -> None:
    clips = [named.clip for named in read_benchmark(copy.dataset).clips]
    assert [(clip.video_id, clip.split, clip.label) for clip in clips] == [
        ("v_ApplyEyeMakeup_g08_c01", "train", "apply eye makeup"),
        ("v_YoYo_g25_c05", "train", "yo yo"),
        ("v_HandStandPushups_g08_c01", "train", "handstand pushups"),
        ("v_ApplyEyeMakeup_g01_c01", "test", "apply eye makeup"),
    ]
    assert clips[0].path == "UCF-101/ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi"


def test_the_fold_chooses_the_lists(copy: Copy) -> None:
    clips = [named.clip for named in read_benchmark(copy.with_(fold=2)).clips]
    assert {clip.video_id: clip.split for clip in clips} == {
        "v_ApplyEyeMakeup_g01_c01": "train",
        "v_YoYo_g25_c05": "train",
        "v_HandStandPushups_g08_c01": "train",
        "v_ApplyEyeMakeup_g08_c01": "test",
    }


def test_files_spelled_with_other_capitals_are_found(copy: Copy) -> None:
    file = copy.files[2]
    file.rename(file.parent / "v_HandstandPushups_g08_c01.avi")
    assert check_benchmark(copy.dataset).is_complete
    found = {named.video_id: named.clip.path for named in read_benchmark(copy.dataset).clips}
    assert found["v_HandStandPushups_g08_c01"].endswith("v_HandstandPushups_g08_c01.avi")


def test_a_line_of_an_unknown_class_is_refused(copy: Copy) -> None:
    (copy.annotations / "ucfTrainTestlist/testlist01.txt").write_text(
        "Juggling/v_Juggling_g01_c01.avi\nv_no_folder.avi\n"
    )
    refused = read_benchmark(copy.dataset).refused
    assert [one.status for one in refused] == [Status.BAD_ROW] * 2
    assert "testlist01.txt, line 1" in refused[0].detail and "'Juggling'" in refused[0].detail


@pytest.mark.parametrize(
    ("name", "words"),
    [("BalanceBeam", "balance beam"), ("TaiChi", "tai chi"), ("Archery", "archery"), ("YoYo", "yo yo")],
)
def test_class_names_are_spelled_out(name: str, words: str) -> None:
    assert spell_out(name) == words
