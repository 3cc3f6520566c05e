"""HMDB51: a list for each class, file names with all sorts of characters."""

from pathlib import Path

import pytest
from benchmark_copies import Copy, make_copy

from stm.datasets.actions import check_benchmark, read_benchmark
from stm.jobs.status import Status
from stm.manifest import make_key


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Copy:
    return make_copy("hmdb51", tmp_path, monkeypatch)


def test_flags_choose_the_split_and_clips_of_neither_are_left_out(copy: Copy) -> None:
    clips = [named.clip for named in read_benchmark(copy.dataset).clips]
    assert [(clip.path, clip.split, clip.label) for clip in clips] == [
        ("brush_hair/April_09_brush_hair_u_nm_np1_ba_goo_0.avi", "train", "brush hair"),
        ("clap/#20_Rhythm_clap_u_nm_np5_fr_goo_0.avi", "train", "clap"),
        ("clap/a (b) [c] & d!;e_clap_u_nm_np1_fr_bad_1.avi", "test", "clap"),
        ("shoot_bow/6arrowswithin30seconds_shoot_bow_f_nm_np1_fr_med_0.avi", "train", "shoot bow"),
        ("shoot_bow/same.avi", "test", "shoot bow"),
        ("sit/same.avi", "train", "sit"),
    ]
    assert clips[0].video_id == "brush_hair/April_09_brush_hair_u_nm_np1_ba_goo_0"
    assert all(make_key(str(clip.video_id)).isascii() and "." not in make_key(str(clip.video_id)) for clip in clips)


def test_the_fold_chooses_the_lists(copy: Copy) -> None:
    clips = [named.clip for named in read_benchmark(copy.with_(fold=2)).clips]
    assert [clip.split for clip in clips] == ["test", "test", "train", "test", "train", "test"]


def test_files_of_one_name_in_two_classes_are_distinguished_by_their_folder(copy: Copy) -> None:
    (copy.root / "sit/same.avi").unlink()
    found = read_benchmark(copy.with_(partial=True))
    assert [(one.video_id, one.status) for one in found.refused] == [("sit/same", Status.MISSING_FILE)]
    assert found.report.missing == {"sit/same.avi": 1}


def test_names_of_one_class_are_found_without_folders(copy: Copy) -> None:
    for file in copy.files:
        if file.name != "same.avi":
            file.rename(copy.root / file.name)
    assert check_benchmark(copy.dataset).is_complete


def test_an_unknown_flag_is_refused(copy: Copy) -> None:
    (copy.annotations / "testTrainMulti_7030_splits/sit_test_split1.txt").write_text("same.avi 3\nalone.avi\n")
    refused = read_benchmark(copy.dataset).refused
    assert [one.status for one in refused] == [Status.BAD_ROW] * 2
    assert "sit_test_split1.txt, line 1: must be a file's name and 0, 1 or 2, is 'same.avi 3'" in refused[0].detail
