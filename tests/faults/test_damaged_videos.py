"""Damaged videos are listed with a reason, and the results of the intact ones beside them do not change."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from damaged_videos import make_good, place_all, place_traps
from synthetic_videos import make_row, write_slice
from trial import Tally, deadline, snapshot

from stm.config import BadInput, Config, Frames, Motion, parse_config
from stm.datasets import build_manifest
from stm.manifest import make_key
from stm.preprocess.frames.extract import extract_frames
from stm.preprocess.frames.table import read_jpegs
from stm.preprocess.motion.measure import extract_motion
from stm.storage.tables import read_table, write_table

FEW, MANY = 25, 240
COUNTS = pytest.mark.parametrize("count", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
KEEP_GOING = BadInput(max_failure_rate=1.0)
SETTINGS = Frames(every=2, short_side=32, min_side=16, timeout_seconds=600)


def config_of(root: Path, **dataset: Any) -> Config:
    extensions = [".mp4", ".mkv", ".avi", ".ts", ".webm", ".gif", ".jpg", ".png", ".webp"]
    source = {"source": "folder", "root": str(root), "extensions": extensions, "probe_timeout_seconds": 600, **dataset}
    return parse_config(
        {"name": "x", "dataset": source, "bad_input": {"max_failure_rate": 1.0}, "frames": {"min_side": 16}}
    )


def build(config: Config, folder: Path) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """The rows of the manifest and of the quarantine by path."""
    build_manifest(config, None, folder / "manifest.parquet", folder / "quarantine.parquet", processes=1)
    tables = [read_table(folder / f"{name}.parquet").to_pylist() for name in ("manifest", "quarantine")]
    return tuple({row["path"]: row for row in rows} for rows in tables)  # type: ignore[return-value]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return make_good(tmp_path_factory.mktemp("good"))


@COUNTS
def test_the_manifest_accounts_for_every_file(
    count: int, good: dict[str, bytes], tmp_path: Path, table: Callable[[Tally], None]
) -> None:
    (tmp_path / "elsewhere.mp4").write_bytes(good["mp4"])
    bad = place_all(tmp_path / "videos", good, count)
    bad |= place_traps(tmp_path / "videos", tmp_path / "elsewhere.mp4")
    (tmp_path / "alone").mkdir()
    for kind, data in good.items():
        for root in ("videos", "alone"):
            (tmp_path / root / f"good.{kind}").write_bytes(data)
    before = snapshot(tmp_path, tmp_path / "outputs")
    with deadline(1500):
        kept, refused = build(config_of(tmp_path / "videos"), tmp_path / "outputs")
    alone, _ = build(config_of(tmp_path / "alone"), tmp_path / "outputs/alone")
    names = [f"good.{kind}" for kind in good]
    assert [kept[name] for name in names] == [alone[name] for name in names]
    tally = Tally("manifest, videos")
    for name, kind in bad.items():
        assert name in kept or name in refused, f"{kind}: {name!r} is missing in both tables"
        tally.add(refused[name]["status"] if name in refused else "no damage detected")
        assert name not in refused or refused[name]["detail"]
    assert {refused[name]["status"] for name in ("loop.mp4", "outside.mp4")} <= {"path_outside_root", "missing_file"}
    assert all(name in kept for name, kind in bad.items() if kind == "hostile name")
    table(tally)
    assert snapshot(tmp_path, tmp_path / "outputs") == before


def stage_rows(root: Path, bad: dict[str, str], good: dict[str, bytes]) -> list[dict[str, Any]]:
    """Rows of all files, of paths that lead elsewhere, and of one video with impossible start and end times."""
    names = [*bad, *(f"good.{kind}" for kind in good)]
    rows = [make_row(name, bytes=(root / name).stat().st_size) for name in names]
    hostile = (
        "../elsewhere.mp4",
        "/etc/hostname",
        "a/../../elsewhere.mp4",
        "nul\0.mp4",
        "gone.mp4",
        "",
        ".",
        "folder.mp4",
    )
    rows += [make_row(name, video_id=f"hostile{number}") for number, name in enumerate(hostile)]
    times = [(-1.0, None), (float("nan"), None), (float("inf"), 2.0), (0.0, float("nan")), (1e300, 2e300), (5.0, 1.0)]
    rows += [
        make_row("good.mp4", video_id=f"times{number}", start=start, end=end)
        for number, (start, end) in enumerate(times)
    ]
    return rows


@COUNTS
def test_frames_and_motion_account_for_every_video(
    count: int, good: dict[str, bytes], tmp_path: Path, table: Callable[[Tally], None]
) -> None:
    root, outputs = tmp_path / "videos", tmp_path / "outputs"
    (tmp_path / "elsewhere.mp4").write_bytes(good["mp4"])
    bad = place_all(root, good, count)
    (root / "folder.mp4").mkdir()
    for kind, data in good.items():
        (root / f"good.{kind}").write_bytes(data)
    rows = stage_rows(root, bad, good)
    alone = [
        row for row in rows if row["path"] in {f"good.{kind}" for kind in good} and row["start"] is None is row["end"]
    ]
    before = snapshot(tmp_path, outputs)
    extract = lambda name, rows: extract_frames(  # noqa: E731
        write_slice(outputs / f"{name}-slice.parquet", rows), root, outputs / f"{name}.tar", outputs / f"{name}.parquet",
        SETTINGS, KEEP_GOING, 1,
    )  # fmt: skip
    with deadline(1500):
        extract("all", rows)
    extract("alone", alone)
    found = {row["key"]: row for row in read_table(outputs / "all.parquet").to_pylist()}
    expected = {row["key"]: row for row in read_table(outputs / "alone.parquet").to_pylist()}
    assert found.keys() == {row["key"] for row in rows}
    for key, row in expected.items():
        assert (
            row["kept"] == found[key]["kept"]
            and row["sha256"] == found[key]["sha256"]
            and row["pts"] == found[key]["pts"]
        )
        assert read_jpegs(outputs / "all.tar", found[key]) == read_jpegs(outputs / "alone.tar", row)
    tally = Tally("frames, videos")
    for key, row in found.items():
        if key not in expected:
            tally.add(row["status"] if row["status"] != "ok" else "no damage detected")
            assert row["status"] == "ok" or row["detail"]
    assert all(found[f"hostile{n}"]["status"] == "path_outside_root" for n in range(4))
    table(tally)
    _measure_motion(root, outputs, rows, found, expected[make_key("good.mp4")], table)
    assert snapshot(tmp_path, outputs) == before


def _measure_motion(
    root: Path, outputs: Path, rows: list[dict[str, Any]], found: dict[str, Any], good: dict[str, Any], table: Any
) -> None:
    """Measure motion of the same videos, with a frames table that lists all of them as if they were damaged afterwards."""
    stored = [
        good | {name: row[name] for name in ("key", "video_id", "path")}
        for row in sorted(rows, key=lambda row: row["key"])
    ]
    schema = read_table(outputs / "all.parquet").schema
    write_table(outputs / "stored.parquet", pa.Table.from_pylist(stored, schema=schema), {})
    motion = Motion(timeout_seconds=600)
    with deadline(1500):
        extract_motion(
            outputs / "all-slice.parquet",
            root,
            outputs / "stored.parquet",
            outputs / "m.parquet",
            motion,
            4,
            KEEP_GOING,
            1,
        )
    measured = {row["key"]: row for row in read_table(outputs / "m.parquet").to_pylist()}
    tally = Tally("motion, videos")
    assert measured.keys() == found.keys()
    for row in measured.values():
        tally.add(row["status"] if row["status"] != "ok" else "no damage detected")
        assert (row["magnitude"] is not None) if row["status"] == "ok" else row["detail"]
    assert measured[good["key"]]["status"] == "ok"
    table(tally)
