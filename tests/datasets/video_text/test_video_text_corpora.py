"""Pretraining corpora: lists of millions of lines, read one by one; missing files are reported and left out."""

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from language_copies import build, make_dataset, write_list, write_table
from PIL import Image

from stm.config import parse_config
from stm.datasets import DatasetError, list_fingerprint
from stm.datasets.video_text import (
    CORPORA,
    check_language,
    has_images,
    is_corpus,
    official_counts,
    read_language,
    streams,
)
from stm.jobs.status import Status
from stm.storage.tables import read_table

ENTRIES = [
    {"image": "a/1.jpg", "caption": "A red bus."},
    {"image": "b/1.jpg", "caption": "a \u201cblue\u201d bus"},
    {"image": "a/1.jpg", "caption": "the same bus again"},
    {"image": "gone.jpg", "caption": "no longer there"},
]
FILES = ["a/1.jpg", "b/1.jpg", "stranger.jpg"]


def test_all_corpora_of_umts_mixtures_are_known() -> None:
    assert {name for name in CORPORA if has_images(name)} == {"cc3m", "cc12m", "sbu", "visual-genome", "coco"}
    assert all(is_corpus(name) for name in CORPORA) and not is_corpus("msrvtt") and not has_images("msrvtt")
    assert official_counts("cc3m") == {"train": 3_318_333}


@pytest.mark.parametrize("kind", ["list", "filename", "image", "video"])
def test_lists_and_tables_say_the_same_however_the_column_is_called(kind: str, tmp_path: Path) -> None:
    dataset = make_dataset("cc3m", tmp_path, FILES)
    if kind == "list":
        write_list(tmp_path / "lists/anno_pretrain/cc3m_train.json", ENTRIES)
    else:
        rows = [(entry["image"], entry["caption"]) for entry in ENTRIES]
        write_table(tmp_path / "lists/cc3m_train.sqlite.db", rows, kind)
    found = read_language(dataset)
    assert {named.video_id: named.clip.captions for named in found.clips} == {
        "a/1": ("A red bus.", "the same bus again"),
        "b/1": ("a \u201cblue\u201d bus",),
    }
    assert [(one.path, one.status) for one in found.refused] == [("gone.jpg", Status.MISSING_FILE)]
    assert len(found.annotations) == 1 and all(len(value) == 64 for value in found.annotations.values())


def test_missing_files_are_reported_against_the_published_size_and_stop_nothing(tmp_path: Path) -> None:
    dataset = make_dataset("cc3m", tmp_path, FILES)
    write_list(tmp_path / "lists/cc3m_train.json", ENTRIES)
    report = check_language(dataset)
    assert not report.is_complete and report.is_official and report.found == 2
    assert "  train   ~3,318,333            3            2            4            ?" in report.describe()
    assert "1 images have no file. The first of 1 missing files:\n  gone.jpg" in report.describe()
    for name in FILES[:2]:
        (Path(dataset.root) / name).unlink()
    with pytest.raises(DatasetError, match="at the listed paths below it"):
        check_language(dataset)


@pytest.mark.parametrize("path", ["../x.jpg", "/etc/passwd", "a/../../x.jpg", "a\x00.jpg"])
@pytest.mark.parametrize("table", [False, True])
def test_hostile_names_are_refused(path: str, table: bool, tmp_path: Path) -> None:
    (tmp_path / "x.jpg").touch()
    dataset = make_dataset("sbu", tmp_path, FILES)
    if table:
        write_table(tmp_path / "lists/sbu.sqlite.db", [(path, "x"), ("a/1.jpg", "y"), ("'; DROP TABLE annos; --", "z")])
    else:
        write_list(tmp_path / "lists/sbu.json", [{"image": path, "caption": "x"}, ENTRIES[0]])
    found = read_language(dataset)
    assert [named.video_id for named in found.clips] == ["a/1"]
    assert found.refused[0].status is Status.PATH_OUTSIDE_ROOT and check_language(dataset).found == 1


def test_links_must_not_leave_the_root_and_linked_folders_are_reported(tmp_path: Path) -> None:
    dataset = make_dataset("coco", tmp_path, FILES)
    (tmp_path / "secret.jpg").touch()
    (Path(dataset.root) / "out.jpg").symlink_to(tmp_path / "secret.jpg")
    (Path(dataset.root) / "again").symlink_to(dataset.root)
    names = ("out.jpg", "again/a/1.jpg", "a/1.jpg")
    write_list(tmp_path / "lists/coco.json", [{"image": name, "caption": "x"} for name in names])
    found = read_language(dataset)
    assert {one.path: one.status for one in found.refused} == {
        "out.jpg": Status.PATH_OUTSIDE_ROOT,
        "again/a/1.jpg": Status.MISSING_FILE,
    }
    assert "Linked folders are not searched: again" in found.report.describe()


def test_bad_lines_of_a_table_are_refused_row_by_row(tmp_path: Path) -> None:
    dataset = make_dataset("webvid-2m", tmp_path, ["1.mp4"])
    rows: list[tuple[Any, Any]] = [("1.mp4", None), (None, "x"), ("1.mp4", b"\xff\xfe"), ("1.mp4", ""), ("1.mp4", "ok")]
    write_table(tmp_path / "lists/webvid_train.sqlite.db", rows, "video")
    found = read_language(dataset)
    assert [named.clip.captions for named in found.clips] == [("ok",)]
    assert [one.status for one in found.refused] == [Status.BAD_ROW] * 4
    assert "webvid_train.sqlite.db, id 1" in found.refused[0].detail and check_language(dataset).found == 1


def test_a_table_is_only_read_and_needs_no_right_to_write(tmp_path: Path) -> None:
    path = tmp_path / "a folder?#/sbu.sqlite.db"
    write_table(path, [("a/1.jpg", "x")])
    before = path.read_bytes()
    path.chmod(0o444)
    assert [row for _, row in streams.stream_rows(path)] == [{"filename": "a/1.jpg", "caption": "x"}]
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == [path.name]


def test_other_tables_and_damaged_files_are_readable_errors(tmp_path: Path) -> None:
    dataset = make_dataset("sbu", tmp_path, FILES)
    path = tmp_path / "lists/sbu.sqlite.db"
    with pytest.raises(DatasetError, match=r"none of sbu\.json, sbu\.sqlite\.db, sbu\.db"):
        read_language(dataset)
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE annos (id integer, url text, caption text)")
    connection.close()
    with pytest.raises(DatasetError, match=r"no table annos\(id, filename, caption\).* caption, id, url"):
        read_language(dataset)
    path.write_bytes(b"<html>404</html>" * 100)
    with pytest.raises(DatasetError, match="is not an SQLite file"):
        read_language(dataset)


# ------------------------------------------------------------------------------------------------ long lists


@pytest.mark.parametrize("chunk", [1, 2, 7, 64, 1 << 20])
def test_a_streamed_list_is_the_parsed_list_wherever_the_chunks_end(
    chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "_CHUNK", chunk)
    values: list[Any] = [
        *ENTRIES,
        {"caption": 'a "quoted" ] , [ text\\', "image": "\u00e9\U0001f600.jpg"},
        12345,
        -0.5,
        None,
        "x",
        [],
    ]
    for name, text in {
        "a.json": json.dumps(values),
        "b.json": json.dumps(values, indent=2, ensure_ascii=False),
    }.items():
        (tmp_path / name).write_text(f"\ufeff \n{text}\n", encoding="utf-8")
        assert [row for _, row in streams.stream_rows(tmp_path / name)] == values
    (tmp_path / "empty.json").write_text(" [ ] ")
    assert list(streams.stream_rows(tmp_path / "empty.json")) == []


@pytest.mark.parametrize(
    "text", ["", "{}", "[", "[1", "[1,", "[1 2]", '[{"image": "a"', "[1,,2]", "[" * 100_000, "<html>", "[1;2]"]
)
def test_a_damaged_list_is_an_error_that_names_it(text: str, tmp_path: Path) -> None:
    (tmp_path / "torn.json").write_text(text)
    with pytest.raises(DatasetError, match=r"torn\.json: is not a JSON list"):
        list(streams.stream_rows(tmp_path / "torn.json"))


def test_reading_a_file_that_is_one_endless_string_stops_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "_LONGEST", 1000)
    monkeypatch.setattr(streams, "_CHUNK", 100)
    (tmp_path / "torn.json").write_text('["' + "x" * 5000)
    with pytest.raises(DatasetError, match="too long to be a caption"):
        list(streams.stream_rows(tmp_path / "torn.json"))


# ------------------------------------------------------------------------------------------------ the manifest


def test_images_become_a_manifest_and_a_partial_copy_never_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = make_dataset("cc3m", tmp_path, FILES)
    for name in FILES[:2]:
        Image.new("RGB", (80, 60), "red").save(Path(dataset.root) / name)
    gone = [{"image": f"{number}.jpg", "caption": "x"} for number in range(30)]
    write_list(tmp_path / "lists/cc3m_train.json", ENTRIES + gone)
    values = {"name": "x", "dataset": dataset.model_dump(mode="json")}
    with pytest.raises(DatasetError, match=r"frames\.min_frames is 2.*set it to 1"):
        build(parse_config(values), tmp_path / "out", monkeypatch)
    config = parse_config({**values, "frames": {"min_frames": 1}})
    manifest, quarantine = build(config, tmp_path / "out", monkeypatch)
    rows = read_table(manifest).to_pylist()
    assert [(row["video_id"], row["frames"], row["width"], row["fps"]) for row in rows] == [
        ("a/1", 1, 80, None),
        ("b/1", 1, 80, None),
    ]
    assert {row["status"] for row in read_table(quarantine).to_pylist()} == {"missing_file"}
    before = list_fingerprint(config)
    assert list_fingerprint(config) == before
    (Path(dataset.root) / "gone.jpg").touch()
    assert list_fingerprint(config) != before
