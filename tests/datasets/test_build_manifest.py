"""From a folder to the manifest: the right rows, the right refusals, the same bytes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_probe import ffmpeg, make_video

import stm.datasets
from stm.config import Config, MovingShapesDataset, parse_config
from stm.datasets import DatasetError, build_manifest, list_fingerprint
from stm.datasets.annotations import AnnotationError
from stm.datasets.moving_shapes.generate import generate
from stm.manifest import MANIFEST_SCHEMA, QUARANTINE_SCHEMA, TooManyFailures, make_key
from stm.storage.files import sha256_file
from stm.storage.tables import read_table


def config_of(root: Path, annotations: Path | None = None, **more: Any) -> Config:
    dataset: dict[str, Any] = {"source": "folder", "root": str(root), "split": "train"}
    if annotations:
        dataset["annotations"] = str(annotations)
    return parse_config({"name": "test", "dataset": dataset, "bad_input": {"max_failure_rate": 1.0}, **more})


def build(config: Config, folder: Path, generated: Path | None = None) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The manifest's rows, and the status by video id of the refused clips."""
    manifest, quarantine = folder / "manifest.parquet", folder / "quarantine.parquet"
    build_manifest(config, generated, manifest, quarantine, processes=1)
    clips, refused = read_table(manifest), read_table(quarantine)
    assert clips.schema.equals(MANIFEST_SCHEMA) and refused.schema.equals(QUARANTINE_SCHEMA)
    rows = clips.to_pylist()
    assert [r["video_id"] for r in rows] == sorted(r["video_id"] for r in rows)
    return rows, {r["video_id"]: r["status"] for r in refused.to_pylist()}


@pytest.fixture(scope="session")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_video(tmp_path_factory.mktemp("video") / "video.mp4", frames=4)


def place(video: Path, root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(video, root / name)


def test_a_folder_without_annotations(video: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    place(
        video,
        root,
        "b.MP4",
        "a/c.mp4",
        "a/d.e.mp4",
        ".hidden.mp4",
        ".cache/x.mp4",
        "same.mp4",
        "same.mkv",
        "ümlaut ö.mp4",
    )
    (root / "readme.txt").write_text("no video")
    rows, refused = build(config_of(root), tmp_path / "out")
    assert [r["video_id"] for r in rows] == ["a/c", "a/d.e", "b", "same.mkv", "same.mp4", "ümlaut ö"]
    assert refused == {}
    row = rows[0]
    assert row["path"] == "a/c.mp4" and row["split"] == "train" and row["label"] is None and row["captions"] == []
    assert row["key"] == make_key("a/c") and row["sha256"] == sha256_file(video) and row["width"] == 96


def test_bad_files_are_rows_of_the_quarantine(video: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    place(video, root, "good.mp4", "cut.mp4")
    make_video(root / "tiny.mp4", frames=2, width=40, height=16)
    make_video(root / "one_frame.mp4", frames=1)
    (root / "cut.mp4").write_bytes(video.read_bytes()[:150])
    (root / "empty.mp4").touch()
    (root / "text.mp4").write_text("hello\n" * 100)
    ffmpeg("-f", "lavfi", "-i", "sine=duration=0.2", root / "sound.mp4")
    place(video, tmp_path, "outside/secret.mp4")
    (root / "link.mp4").symlink_to(tmp_path / "outside" / "secret.mp4")
    (root / "inner.mp4").symlink_to(root / "good.mp4")
    (root / "linked_folder").symlink_to(tmp_path / "outside")
    (root / "gone.mp4").symlink_to(root / "nowhere.mp4")
    (root / "loop.mp4").symlink_to(root / "loop.mp4")
    (root / os.fsdecode(b"latin\xe9.mp4")).write_bytes(video.read_bytes())
    rows, refused = build(config_of(root), tmp_path / "out")
    assert [r["video_id"] for r in rows] == ["good", "inner", "one_frame"]
    assert refused == {
        "cut": "open_failed",
        "empty": "empty_file",
        "gone.mp4": "missing_file",
        "latin\\udce9.mp4": "bad_row",
        "link.mp4": "path_outside_root",
        "linked_folder": "path_outside_root",
        "loop.mp4": "missing_file",
        "sound": "no_video_stream",
        "text": "open_failed",
        "tiny": "too_small",
    }


def test_annotations_decide_what_is_taken(video: Path, tmp_path: Path) -> None:
    root, annotations = tmp_path / "root", tmp_path / "notes.json"
    place(video, root, "a.mp4", "b.mp4", "c.mp4", "unnamed.mp4")
    place(video, tmp_path, "outside.mp4")
    entries = [
        {"path": "a.mp4", "split": "test", "label": "run", "captions": ["", "x"], "video_id": "A"},
        {"path": "b.mp4", "video_id": "A"},  # taken already
        {"path": "b.mp4", "start": 0, "end": 0.5},
        {"path": "b.mp4", "start": 0.5},
        {"path": "b.mp4", "start": 3, "end": 1},
        {"path": "c.mp4", "split": "a b"},
        {"path": "../outside.mp4"},
        {"path": str(tmp_path / "outside.mp4"), "video_id": "absolute"},
        {"path": "none.mp4"},
        {"path": "x" * 5000, "video_id": "long"},
        {"path": ""},
        7,
    ]
    annotations.write_text(json.dumps(entries))
    rows, refused = build(config_of(root, annotations), tmp_path / "out")
    assert [(r["video_id"], r["start"], r["end"], r["split"]) for r in rows] == [
        ("A", None, None, "test"),
        ("b@0-0.5", 0.0, 0.5, "train"),
        ("b@0.5-", 0.5, None, "train"),
    ]
    assert rows[0]["captions"] == ["", "x"] and rows[0]["label"] == "run"
    assert refused == {
        "A": "duplicate_id",
        "b.mp4": "bad_row",
        "c.mp4": "bad_row",
        "../outside.mp4": "path_outside_root",
        "absolute": "path_outside_root",
        "none.mp4": "missing_file",
        "long": "missing_file",
        "clip 10": "bad_row",
        "clip 11": "bad_row",
    }


def test_the_same_dataset_gives_the_same_bytes_wherever_it_lies(video: Path, tmp_path: Path) -> None:
    for place_ in ("here", "there"):
        place(video, tmp_path / place_ / "root", "b.mp4", "a.mp4", "c/d.mp4")
        (tmp_path / place_ / "root" / "bad.mp4").write_text("text")
        build(config_of(tmp_path / place_ / "root"), tmp_path / place_ / "out")
    for name in ("manifest.parquet", "quarantine.parquet"):
        assert (tmp_path / "here/out" / name).read_bytes() == (tmp_path / "there/out" / name).read_bytes()
    assert {p.name for p in (tmp_path / "here/out").iterdir()} == {"manifest.parquet", "quarantine.parquet"}


def test_policies_of_the_config_are_followed(video: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    place(video, root, "good.mp4")
    make_video(root / "tiny.mp4", frames=2, width=40, height=16)
    keep: dict[str, Any] = {"bad_input": {"policy": {"too_small": "keep", "missing_file": "keep"}}}
    (root / "gone.mp4").symlink_to(root / "nowhere.mp4")
    rows, _ = build(config_of(root, **keep), tmp_path / "out")
    assert [r["video_id"] for r in rows] == ["good", "tiny"]
    policies = {r["video_id"]: r["policy"] for r in read_table(tmp_path / "out/quarantine.parquet").to_pylist()}
    assert policies == {"tiny": "keep", "gone.mp4": "drop"}  # what does not exist cannot be kept
    with pytest.raises(TooManyFailures, match="tiny: too_small"):
        build(config_of(root, bad_input={"policy": {"too_small": "fail"}}), tmp_path / "out")


def test_a_folder_of_mostly_bad_files_stops_the_run_and_says_why(video: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    place(video, root, "good.mp4")
    for number in range(9):
        (root / f"bad{number}.mp4").write_text("text")
    with pytest.raises(TooManyFailures, match="9 of 10"):
        build(config_of(root, bad_input={"max_failure_rate": 0.5}), tmp_path / "out")
    assert read_table(tmp_path / "out/quarantine.parquet").num_rows == 9


def test_a_dataset_without_one_usable_clip_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "text.mp4").write_text("text")
    with pytest.raises(DatasetError, match=r"none of the clips.*\n.*text: open_failed"):
        build(config_of(tmp_path / "root"), tmp_path / "out")
    assert read_table(tmp_path / "out/quarantine.parquet").num_rows == 1


def test_scripts_without_a_main_guard_can_call_it(video: Path, tmp_path: Path) -> None:
    """Workflow scripts have none; Python's own `spawn` would run them again in each worker."""
    place(video, tmp_path / "root", "a.mp4", "b.mp4")
    script = tmp_path / "script.py"
    values = {"name": "test", "dataset": {"source": "folder", "root": str(tmp_path / "root")}}
    script.write_text(
        "from pathlib import Path\nfrom stm.config import parse_config\nfrom stm.datasets import build_manifest\n"
        f"print('started')\nout = Path({str(tmp_path)!r})\n"
        f"build_manifest(parse_config({values!r}), None, out / 'm.parquet', out / 'q.parquet', 2)\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert done.stdout == "started\n"
    assert read_table(tmp_path / "m.parquet").num_rows == 2


def test_datasets_that_cannot_be_used_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="not a folder"):
        build(config_of(tmp_path / "none"), tmp_path / "out")
    (tmp_path / "root").mkdir()
    with pytest.raises(DatasetError, match=r"no file ending in \.mp4"):
        build(config_of(tmp_path / "root"), tmp_path / "out")
    with pytest.raises(AnnotationError, match="there is no file"):
        build(config_of(tmp_path / "root", tmp_path / "none.csv"), tmp_path / "out")


def test_a_killed_run_does_not_open_finished_files_again(
    video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, opened = tmp_path / "root", []
    place(video, root, "a.mp4", "b.mp4", "c.mp4")
    real = stm.datasets.probe_files

    def dying(paths: Any, *rest: Any) -> Any:
        for number, result in enumerate(real(paths, *rest)):
            opened.append(result[0].name)
            yield result
            if number == 1:
                raise KeyboardInterrupt

    monkeypatch.setattr(stm.datasets, "probe_files", dying)
    with pytest.raises(KeyboardInterrupt):
        build(config_of(root), tmp_path / "out")
    opened.clear()
    rows, _ = build(config_of(root), tmp_path / "out")
    assert opened == ["c.mp4"] and len(rows) == 3
    place(video, root, "d.mp4")
    monkeypatch.setattr(stm.datasets, "probe_files", real)
    assert len(build(config_of(root), tmp_path / "out")[0]) == 4


def test_generated_clips_are_a_dataset_like_any_other(tmp_path: Path) -> None:
    dataset = {"source": "moving-shapes", "clips": {"train": 3, "test": 2}, "frames": 8, "width": 64, "height": 64}
    config = parse_config({"name": "test", "dataset": dataset})
    assert isinstance(config.dataset, MovingShapesDataset)
    generate(config.dataset, 0, tmp_path / "generated", processes=1)
    rows, refused = build(config, tmp_path, tmp_path / "generated")
    assert refused == {} and len(rows) == 5
    for row in rows:
        assert row["split"] == row["video_id"].split("-")[0] and row["key"] == row["video_id"]
        assert row["frames"] == 8 and row["captions"] and row["questions"][0]["answer"] and row["label"]
    with pytest.raises(DatasetError, match="generated"):
        build(config, tmp_path)


def test_the_fingerprint_sees_every_change_and_nothing_else(video: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    place(video, root, "a.mp4", "b/c.mp4")
    config = config_of(root)
    seen = [list_fingerprint(config)]
    (root / "notes.txt").write_text("not a video")
    assert list_fingerprint(config) == seen[0]
    assert list_fingerprint(config_of(root, seed=1)) == seen[0]  # nothing of a folder is drawn
    changes = [
        lambda: place(video, root, "b/new.mp4"),
        lambda: os.utime(root / "a.mp4", (1, 1)),
        lambda: (root / "b/c.mp4").unlink(),
    ]
    for change in changes:
        change()
        seen.append(list_fingerprint(config))
    assert len(set(seen)) == len(seen)
    assert list_fingerprint(config_of(tmp_path / "none")) != seen[-1]  # a missing folder has one too


def test_the_fingerprint_sees_the_files_that_annotations_name_whatever_their_ending(
    video: Path, tmp_path: Path
) -> None:
    root, annotations = tmp_path / "root", tmp_path / "notes.json"
    place(video, root, "a.mp4", "film.vid", ".hidden/b.mp4")
    odd = ["film.vid", ".hidden/b.mp4", "none.mp4", "x" * 5000, "\ud800", "a\0b", "", 7]
    annotations.write_text(json.dumps([*({"path": path, "odd": 1} for path in odd), 7]))
    config = config_of(root, annotations)
    seen = [list_fingerprint(config)]
    place(video, root, "unnamed.mp4")
    assert list_fingerprint(config) == seen[0]
    changes = [
        lambda: (root / "film.vid").write_bytes(b"other"),
        lambda: os.utime(root / ".hidden/b.mp4", (1, 1)),
        lambda: place(video, root, "none.mp4"),
        lambda: annotations.write_text('[{"path": "a.mp4"}]'),
        lambda: annotations.write_text("[torn"),
    ]
    for change in changes:
        change()
        seen.append(list_fingerprint(config))
    assert len(set(seen)) == len(seen)


def test_one_file_under_two_spellings_is_one_file(video: Path, tmp_path: Path) -> None:
    root, annotations = tmp_path / "root", tmp_path / "notes.csv"
    place(video, root, "a/b.mp4")
    annotations.write_text("path,start,end\na/b.mp4,0,0.1\n./a//b.mp4,0.1,0.2\n")
    rows, refused = build(config_of(root, annotations), tmp_path / "out")
    assert [(r["video_id"], r["path"]) for r in rows] == [("a/b@0-0.1", "a/b.mp4"), ("a/b@0.1-0.2", "a/b.mp4")]
    assert refused == {}


def test_after_too_many_failures_another_policy_opens_no_file_again(
    video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"
    place(video, root, "good.mp4")
    for number in range(9):
        (root / f"bad{number}.mp4").write_text("text")
    with pytest.raises(TooManyFailures):
        build(config_of(root, bad_input={"max_failure_rate": 0.5}), tmp_path / "out")
    asked: list[Any] = []
    monkeypatch.setattr(stm.datasets, "probe_files", lambda paths, *rest: asked.extend(paths) or iter(()))
    rows, _ = build(config_of(root, bad_input={"max_failure_rate": 0.95}), tmp_path / "out")
    assert asked == [] and len(rows) == 1
    assert not list((tmp_path / "out").glob(".*.journal"))


def test_the_fingerprint_of_generated_clips_is_their_settings(tmp_path: Path) -> None:
    base = {"name": "test", "dataset": {"source": "moving-shapes"}}
    one = list_fingerprint(parse_config(base))
    assert one == list_fingerprint(parse_config({**base, "name": "other", "grid": 7}))
    assert one != list_fingerprint(parse_config({**base, "seed": 1}))
    assert one != list_fingerprint(parse_config({**base, "dataset": {"source": "moving-shapes", "fps": 17}}))
