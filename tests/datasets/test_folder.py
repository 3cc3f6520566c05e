"""Listing a folder's clips: every row and every file is found, or reported with the reason."""

import csv
import errno
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from benchmark_copies import make_copy
from hypothesis import HealthCheck, given, settings, strategies
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


def test_hidden_videos_and_folders_are_counted(tmp_path: Path) -> None:
    files = ["a.mp4", ".b.mp4", "c/._D.AVI", ".e.txt", ".f/g.mp4"]
    (note,) = listing_of(tmp_path, files).notes
    assert note == "3 videos and folders are ignored, because they are hidden: .b.mp4, .f/, c/._D.AVI"
    # Annotations may name hidden files.
    assert len(listing_of(tmp_path, [], "path\n.b.mp4\n.f/g.mp4\n").clips) == 2


PATHS = [
    "a.mp4",
    "./b.mp4",
    " c.mp4 ",
    "sub/d.avi",
    "A.MP4",
    "sub\\d.avi",
    "a%20b.mp4",
    ".hidden.mp4",
    "link.mp4",
    "out.mp4",
]
PATHS += [
    "../x.mp4",
    "/x.mp4",
    "missing.mp4",
    "sub",
    "x" * 300 + ".mp4",
    "n\x00l.mp4",
    "https://a/b.mp4",
    "#.mp4",
    "caf\u00e9.mp4",
]
VALUES: dict[str, list[Any]] = {
    "path": [*PATHS, *PATHS[:4], "", "  ", None, 5, ["a.mp4"]],
    "video_id": [None, "", "x", "x ", 7, "../x", "y" * 1000, "a\x00", True],
    "split": [None, "", "train", "test", "va/l", "s" * 65],
    "label": [None, "", "nan", float("nan"), 1, 1.0, 1.5, "run ", "Caf\u00e9", ["x"], 10**500],
    "caption": [None, "", 'a dog; a cat, "x"', "line\nbreak", "\ufeffx", "x" * 200_000, "=1+1", 5],
    "captions": [None, "", "a|b||c", "[Music]", "[]", "['a', 'b']", '["a", null]', "[1]", ["a", "b"], [], {"a": 1}],
    "start": [None, 0, -1, 1, "1,5", "inf", float("nan"), True, "1e400"],
    "end": [None, 2, 0, "00:00:02", "2.5"],
    "questions": [None, "[]", "{", '[{"question": "q", "answer": "a"}]', 3],
    "unused": ["", None, "a,b\t;", 1],
}
ROWS = strategies.lists(
    strategies.fixed_dictionaries({name: strategies.sampled_from(values) for name, values in VALUES.items()}),
    min_size=1,
    max_size=8,
)


def write_rows(file: Path, rows: list[dict[str, Any]], encoding: str) -> None:
    if file.suffix == ".parquet":
        texts = [{name: None if value is None else str(value) for name, value in row.items()} for row in rows]
        pq.write_table(pa.Table.from_pylist(texts), file)
    elif file.suffix == ".json":
        file.write_text(json.dumps(rows), encoding=encoding)
    elif file.suffix == ".jsonl":
        file.write_text("\n".join(json.dumps(row) for row in rows), encoding=encoding)
    else:
        with file.open("w", newline="", encoding=encoding) as stream:
            writer = csv.writer(stream, delimiter="\t" if file.suffix == ".tsv" else ",")
            writer.writerow(VALUES)
            writer.writerows([row[name] for name in VALUES] for row in rows)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=ROWS,
    ending=strategies.sampled_from(["csv", "tsv", "json", "jsonl", "parquet"]),
    encoding=strategies.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
)
@pytest.mark.filterwarnings("ignore:.*unused columns")
def test_every_row_is_a_clip_a_refused_clip_or_counted(
    rows: list[dict[str, Any]], ending: str, encoding: str, tmp_path: Path
) -> None:
    root, file = tmp_path / "root", tmp_path / f"a.{ending}"
    if not root.exists():
        (root / "sub").mkdir(parents=True)
        for name in ("a.mp4", "b.mp4", "c.mp4", "sub/d.avi", "#.mp4", ".hidden.mp4", "cafe\u0301.mp4"):
            (root / name).touch()
        (root / "link.mp4").symlink_to("a.mp4")
        (root / "out.mp4").symlink_to("/dev/null")
    if ending in ("csv", "tsv"):  # which cannot hold a row without any value
        rows = [row for row in rows if any(str("" if value is None else value).strip() for value in row.values())]
    rows = [{**dict.fromkeys(VALUES), "path": "a.mp4"}, *rows]
    write_rows(file, rows, encoding)
    listing = list_clips(root, file, EXTENSIONS, "train")
    counted = sum(int(note.split(" rows add captions")[0].replace(",", "")) for note in listing.notes)
    assert len(listing.clips) + len(listing.refused) + counted == len(rows)
    assert all(refused.detail for refused in listing.refused)


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
