"""Kinetics-400: names made of id and seconds, and the many layouts in which copies lie about."""

from pathlib import Path

import pytest
from benchmark_copies import Copy, make_copy, write

from stm.datasets import DatasetError
from stm.datasets.actions import check_benchmark, read_benchmark
from stm.jobs.status import Status


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Copy:
    return make_copy("kinetics-400", tmp_path, monkeypatch)


def paths(copy: Copy) -> dict[str, str]:
    return {named.video_id[:11]: named.clip.path for named in read_benchmark(copy.dataset).clips}


def test_ids_names_and_labels(copy: Copy) -> None:
    clips = [named.clip for named in read_benchmark(copy.dataset).clips]
    assert [(clip.video_id, clip.label, clip.split) for clip in clips] == [
        ("---QUuC4vJs_000084_000094", "testifying", "train"),
        ("--3ouPhoy2A_000020_000030", "massaging person's head", "train"),
        ("-0RDtzQ4DwI_001063_001073", "eating spaghetti", "train"),
        ("--07WQ2iBlw_000001_000011", "javelin throw", "val"),
    ]
    # The files are the ten seconds already.
    assert all(clip.start is None and clip.end is None and clip.captions == () for clip in clips)


def test_copies_in_class_folders_under_the_id_alone_and_of_other_kinds_of_files(copy: Copy) -> None:
    first, second, third, fourth = copy.files
    (copy.root / "train/massaging person's head").mkdir()
    first.rename(copy.root / "---QUuC4vJs.mp4")
    second.rename(copy.root / "train/massaging person's head/--3ouPhoy2A_000020_000030.mkv")
    third.rename(copy.root / "train/-0RDtzQ4DwI.webm")
    assert paths(copy) == {
        "---QUuC4vJs": "---QUuC4vJs.mp4",
        "--3ouPhoy2A": "train/massaging person's head/--3ouPhoy2A_000020_000030.mkv",
        "-0RDtzQ4DwI": "train/-0RDtzQ4DwI.webm",
        "--07WQ2iBlw": fourth.relative_to(copy.root).as_posix(),
    }


def test_replacements_of_broken_files_are_preferred(copy: Copy) -> None:
    name = copy.files[0].name
    write(copy.root / "replacement/replacement_for_corrupted_k400" / name, "")
    # What arrange_by_classes.py of CVDF makes: links beside the files.
    (copy.root / "a/testifying").mkdir(parents=True)
    (copy.root / "a/testifying" / name).symlink_to(copy.files[0])
    assert paths(copy)["---QUuC4vJs"] == f"replacement/replacement_for_corrupted_k400/{name}"


def test_a_clip_of_two_files_is_taken_from_its_own_split(copy: Copy) -> None:
    write(copy.root / "a" / copy.files[3].name, "")
    assert paths(copy)["--07WQ2iBlw"] == "val/--07WQ2iBlw_000001_000011.mp4"


def test_the_names_of_other_releases_are_understood(copy: Copy) -> None:
    (copy.annotations / "val.csv").rename(copy.annotations / "validate.csv")
    (copy.annotations / "train.csv").rename(copy.annotations / "kinetics-400_train.csv")
    assert check_benchmark(copy.dataset).is_complete


def test_a_list_without_labels_or_with_broken_rows_is_reported(copy: Copy) -> None:
    (copy.annotations / "val.csv").write_text("youtube_id,time_start,time_end,split\n--07WQ2iBlw,1,11,val\n")
    with pytest.raises(DatasetError, match=r"val\.csv: there is no column `label`"):
        read_benchmark(copy.dataset)
    (copy.annotations / "val.csv").write_text(
        "label,youtube_id,time_start,time_end,split\njavelin throw,--07WQ2iBlw,soon\n"
    )
    found = read_benchmark(copy.dataset)
    assert [(one.status, one.path) for one in found.refused] == [(Status.BAD_ROW, None)]
    assert "val.csv, line 2" in found.refused[0].detail and "'soon'" in found.refused[0].detail
    with pytest.raises(DatasetError, match=r"1 lines or files cannot be used[^\n]*\n  val\.csv, line 2"):
        check_benchmark(copy.dataset)


def test_a_quote_that_swallows_lines_is_an_error_and_one_within_a_line_a_bad_row(copy: Copy) -> None:
    rows = "label,youtube_id,time_start,time_end,split,is_cc\n{}\neating spaghetti,-0RDtzQ4DwI,1063,1073,train,1\n"
    write(copy.annotations / "train.csv", rows.format('"testifying,---QUuC4vJs,84,94,train,0\n"x",y,1,2,train,0'))
    with pytest.raises(DatasetError, match=r"train\.csv: is not a CSV file \(line 2"):
        read_benchmark(copy.dataset)
    write(copy.annotations / "train.csv", rows.format('"testifying,---QUuC4vJs,84,94,train,0\nx",y,1,2,train,0'))
    with pytest.raises(DatasetError, match="line 2: a quoted field spans the lines 2 to 3"):
        read_benchmark(copy.dataset)
    write(copy.annotations / "train.csv", rows.format('"testifying" x,---QUuC4vJs,84,94,train,0'))
    result = read_benchmark(copy.dataset)
    assert [clip.video_id[:4] for clip in result.clips] == ["-0RD", "--07"]
    assert result.report.problems == (
        next(problem for problem in result.report.problems if problem.startswith("train.csv, line 2: ")),
    )
