"""Listing a folder's clips: every row and every file is found, or reported with the reason."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from benchmark_copies import make_copy
from language_copies import make_dataset, write_list

from stm.config import parse_config
from stm.datasets import list_fingerprint
from stm.datasets.actions import read_benchmark
from stm.datasets.annotations import AnnotationError
from stm.datasets.folder import DatasetError, Listing, list_clips
from stm.datasets.video_text import read_language
from stm.manifest import Question

EXTENSIONS = (".mp4", ".avi")
COMPOSED, DECOMPOSED = "caf\u00e9", "cafe\u0301"  # NFC and NFD: both look like `café`


def listing_of(folder: Path, files: list[str], annotations: str | None = None, name: str = "a.csv") -> Listing:
    root = folder / "root"
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()
    if annotations is not None:
        (folder / name).write_text(annotations)
    return list_clips(root, None if annotations is None else folder / name, EXTENSIONS, "train")


def statuses(listing: Listing) -> dict[str, str]:
    return {refused.video_id: str(refused.status) for refused in listing.refused}


def fail_below(monkeypatch: pytest.MonkeyPatch, name: str, code: int) -> None:
    """Make the folder `name` unreadable, also for root, who may read everything."""
    real = os.scandir

    def scandir(path: Any) -> Any:
        if Path(path).name == name:
            raise OSError(code, os.strerror(code), str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)


@pytest.mark.parametrize(("written", "stored"), [(COMPOSED, DECOMPOSED), (DECOMPOSED, COMPOSED)])
def test_a_name_is_found_however_its_accents_are_composed(written: str, stored: str, tmp_path: Path) -> None:
    rows = f"path\n{written}/{written}.mp4\n{written}/x.mp4\nnone/{written}.mp4\n"
    listing = listing_of(tmp_path, [f"{stored}/{stored}.mp4", f"{stored}/x.mp4"], rows)
    assert [(c.video_id, c.clip.path) for c in listing.clips] == [
        (f"{COMPOSED}/{COMPOSED}", f"{stored}/{stored}.mp4"),
        (f"{COMPOSED}/x", f"{stored}/x.mp4"),
    ]
    assert statuses(listing) == {f"none/{written}.mp4": "missing_file"}


def test_names_that_differ_only_in_how_accents_are_composed_are_one_clip_and_a_duplicate(tmp_path: Path) -> None:
    files = [f"{COMPOSED}.mp4", f"{DECOMPOSED}.mp4"]
    listing = listing_of(tmp_path, files)
    assert len(listing.clips) == 1 and list(statuses(listing).values()) == ["duplicate_id"]
    # Each row names one of them exactly; the ids look the same.
    listing = listing_of(tmp_path, files, f"path,video_id\n{COMPOSED}.mp4,{COMPOSED}\n{DECOMPOSED}.mp4,{DECOMPOSED}\n")
    assert [c.clip.path for c in listing.clips] == [f"{COMPOSED}.mp4"]
    assert listing.refused[0].detail == "an earlier clip has this video_id, and another path"


def test_the_fingerprint_sees_a_file_whose_name_is_composed_in_another_way(tmp_path: Path) -> None:
    listing_of(tmp_path, [f"{DECOMPOSED}.mp4"], f"path\n{COMPOSED}.mp4\n")
    dataset = {"source": "folder", "root": str(tmp_path / "root"), "annotations": str(tmp_path / "a.csv")}
    config = parse_config({"name": "test", "dataset": dataset})
    before = list_fingerprint(config)
    (tmp_path / f"root/{DECOMPOSED}.mp4").write_bytes(b"other")
    assert list_fingerprint(config) != before


def test_white_space_around_a_path_is_ignored_unless_the_file_has_it(tmp_path: Path) -> None:
    listing = listing_of(tmp_path, ["a.mp4", "b.mp4 "], "path, label\n a.mp4 , run\nb.mp4 ,run \n")
    assert [(c.clip.path, c.clip.label) for c in listing.clips] == [("a.mp4", "run"), ("b.mp4 ", "run")]


def test_one_row_per_caption_is_one_clip_with_all_of_them(tmp_path: Path) -> None:
    rows = "path,label,start,end,caption\na.mp4,x,,,one\nb.mp4,x,,,two\na.mp4,x,,,three\na.mp4,x,,,three\na.mp4,x,0,1,part\n"
    listing = listing_of(tmp_path, ["a.mp4", "b.mp4"], rows)
    assert [(c.video_id, c.clip.captions) for c in listing.clips] == [
        ("a", ("one", "three", "three")),
        ("b", ("two",)),
        ("a@0-1", ("part",)),
    ]
    assert listing.refused == []
    assert [note.split(" add ")[0] for note in listing.notes] == ["2 rows"]


def test_one_row_per_question_is_one_clip_with_all_of_them(tmp_path: Path) -> None:
    rows = "".join(
        f'{{"path": "a.mp4", "questions": [{{"question": "{q}", "answer": "x"}}]}}\n' for q in ("who", "what")
    )
    (clip,) = listing_of(tmp_path, ["a.mp4"], rows, "a.jsonl").clips
    assert clip.clip.questions == (Question("who", "x"), Question("what", "x"))


@pytest.mark.parametrize(
    ("second", "detail"),
    [
        ("a.mp4,,x,train,", "an earlier clip has this video_id"),  # repeats the row and adds nothing
        ("a.mp4,,y,train,two", "an earlier clip has this video_id, and another label"),
        ("a.mp4,,x,test,two", "an earlier clip has this video_id, and another split"),
        ("b.mp4,a,y,train,two", "an earlier clip has this video_id, and another path, label"),
    ],
)
def test_rows_that_contradict_an_earlier_one_are_duplicates_that_say_why(
    second: str, detail: str, tmp_path: Path
) -> None:
    listing = listing_of(
        tmp_path, ["a.mp4", "b.mp4"], f"path,video_id,label,split,caption\na.mp4,,x,train,one\n{second}\n"
    )
    assert [c.clip.captions for c in listing.clips] == [("one",)]
    assert [(str(r.status), r.detail) for r in listing.refused] == [("duplicate_id", detail)]


def test_files_with_other_endings_are_counted(tmp_path: Path) -> None:
    files = ["a.mp4", "b.MPG2", "c/d.mpg2", "c/e.txt", "c/LICENSE", ".hidden.mpg2", "f.mp4.part"]
    (note,) = listing_of(tmp_path, files).notes
    assert note == (
        "5 files are ignored, because their endings are not among dataset.extensions: "
        ".mpg2 (2), (no ending) (1), .part (1), .txt (1)"
    )
    for name in ("a.mp4", "f.mp4.part"):
        (tmp_path / "root" / name).unlink()
    with pytest.raises(DatasetError, match=r"no file ending in \.mp4, \.avi\n4 files are ignored.*\.mpg2 \(2\)"):
        listing_of(tmp_path, [])


def test_a_benchmark_counts_files_with_other_endings_and_lists_unreadable_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = make_copy("ucf101", tmp_path, monkeypatch)
    (copy.root / "x").mkdir()
    (copy.root / "y.mpg2").touch()
    fail_below(monkeypatch, "x", errno.EACCES)
    result = read_benchmark(copy.dataset)
    assert result.report.is_complete
    lines = result.report.describe().splitlines()[-2:]
    assert lines[0] == "1 folders cannot be read. The first: x (Permission denied)" and ".mpg2 (1)" in lines[1]
    assert {r.video_id: str(r.status) for r in result.refused} == {"x": "open_failed"}


def test_a_corpus_finds_names_however_they_are_composed_and_lists_unreadable_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = make_dataset("cc3m", tmp_path, [f"a/{DECOMPOSED}.jpg", "a/B.jpg", "locked/c.jpg"])
    entries = [{"image": path, "caption": "x"} for path in (f"a/{COMPOSED}.jpg", "a/b.jpg", "locked/c.jpg")]
    write_list(Path(dataset.annotations) / "cc3m_train.json", entries)
    fail_below(monkeypatch, "locked", errno.EACCES)
    copy = read_language(dataset)
    assert [named.clip.path for named in copy.clips] == [f"a/{DECOMPOSED}.jpg"]  # the case of a listed path matters
    assert {r.video_id: str(r.status) for r in copy.refused}["locked"] == "open_failed"


def test_a_folder_that_may_not_be_entered_is_a_row_of_the_quarantine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_below(monkeypatch, "locked", errno.EACCES)
    listing = listing_of(tmp_path, ["a.mp4", "x/locked/b.mp4"])
    assert [c.clip.path for c in listing.clips] == ["a.mp4"]
    assert statuses(listing) == {"x/locked": "open_failed"}
    assert "cannot be read (Permission denied)" in listing.refused[0].detail


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ENOMEM])
def test_a_disk_that_fails_stops_the_job(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listing_of(tmp_path, ["a.mp4", "bad/b.mp4"])
    fail_below(monkeypatch, "bad", code)
    with pytest.raises(OSError, match="bad") as caught:
        listing_of(tmp_path, [])
    assert caught.value.errno == code
    real = os.stat

    def stat(path: Any, **more: Any) -> os.stat_result:
        if Path(path).name == "b.mp4":
            raise OSError(code, os.strerror(code), str(path))
        return real(path, **more)

    monkeypatch.setattr(os, "stat", stat)
    with pytest.raises(OSError, match=r"b\.mp4"):
        listing_of(tmp_path, [], "path\na.mp4\nbad/b.mp4\n")


def test_a_file_for_a_folder_and_a_folder_for_a_file_are_errors(tmp_path: Path) -> None:
    listing_of(tmp_path, ["a.mp4"])
    with pytest.raises(DatasetError, match=r"a\.mp4 is not a folder, but a file"):
        list_clips(tmp_path / "root/a.mp4", None, EXTENSIONS, "train")
    with pytest.raises(AnnotationError, match="root is a folder; name the file"):
        list_clips(tmp_path / "root", tmp_path / "root", EXTENSIONS, "train")


def test_a_path_with_backslashes_gets_a_hint(tmp_path: Path) -> None:
    (refused,) = listing_of(tmp_path, ["a/b.mp4"], "path\na\\b.mp4\n").refused
    assert refused.detail == "there is no such file; folders are separated by /"
