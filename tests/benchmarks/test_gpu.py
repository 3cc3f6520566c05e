"""The run on one GPU: each section at a tiny size on a CPU, its limits, and its table."""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import __main__ as program
from benchmarks import gpu

QUICK = ["--device", "cpu", "--quick", "--workers", "0"]


def arguments(tmp_path: Path, *more: str) -> argparse.Namespace:
    return gpu.parse_arguments([*QUICK, "--output", str(tmp_path), *more])


def measure(name: str, tmp_path: Path, *more: str) -> list[dict[str, Any]]:
    return list(gpu.MEASURE[name](arguments(tmp_path, *more), tmp_path))


@pytest.mark.slow
def test_training_is_measured_by_the_loops_own_log_with_and_without_the_loader(tmp_path: Path) -> None:
    rows = [row for name in ("mae", "umt", "loader") for row in measure(name, tmp_path, "--peak", "1e12")]
    names = [row["what"].partition(", batch 2")[0] for row in rows]
    assert names[:4] == ["MAE 0.9", "MAE 0.75", "MAE 0.6", "UMT 0.8"] and set(names[4:]) == {"MAE 0.9"}
    assert sum("from shards" in row["what"] for row in rows) == len(rows) - 4 == 3
    for row in rows:
        assert row["seconds"] == pytest.approx(2 / row["clips_per_second"])
        assert row["share"] == pytest.approx(row["flops"] / 1e12)
        assert row["aims"].startswith("40%") and ("1,500 clips/s" in row["aims"]) == row["what"].startswith("MAE 0.9")
    # Less is hidden: the same step costs more.
    flop = [row["flops"] / row["clips_per_second"] for row in rows[:3]]
    assert flop == sorted(flop) and flop[0] < flop[2]


@pytest.mark.slow
def test_the_similarity_stage_and_the_peak_are_measured(tmp_path: Path) -> None:
    rows = measure("similarity", tmp_path)
    assert [row["what"].split(", ")[1] for row in rows] == ["float32", "dense"]
    assert all("patches/s" in row["remark"] and "image tower alone" in row["remark"] for row in rows)
    (peak,) = measure("peak", tmp_path)
    assert peak["flops"] > 0


@pytest.mark.slow
def test_a_section_that_fails_is_named_and_the_others_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(gpu.SECTIONS, "umt", gpu.Section(9, ("no_such_package",)))
    assert program.main(["gpu", *QUICK, "--only", "umt", "--output", str(tmp_path)]) == 1
    assert "umt: not run: this Python has no no_such_package" in capsys.readouterr().err
    (path,) = tmp_path.glob("*-one-cpu-quick.json")
    sections = json.loads(path.read_text())["sections"]
    assert list(sections) == ["peak", "umt"] and sections["peak"]["status"] == "finished"
    table = path.with_suffix(".md").read_text()
    assert "| matrix peak, float32, 256 x 256 |" in table and "- umt: not run: this Python has no" in table


def test_rows_are_kept_when_a_section_exceeds_its_time(tmp_path: Path) -> None:
    record: dict[str, Any] = {"date": "2026-01-01", "machine": {}}
    record["sections"] = {"mae": {"status": "running", "seconds": 0, "rows": []}}
    records = tmp_path / "records.jsonl"
    records.write_text(json.dumps({"what": "MAE", "clips_per_second": 1234.5, "seconds": 0.25}) + '\n{"what": "half')
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        status = gpu._wait(process, records, arguments(tmp_path), record, "mae", 0.3)
        process.kill()
    assert status == "stopped after its time limit of 0 s"
    assert "| MAE | 1234 | 250.0 |" in (tmp_path / "2026-01-01-one-cpu-quick.md").read_text()


def test_the_limits_of_all_sections_fit_into_ten_minutes() -> None:
    assert sum(section.seconds for section in gpu.SECTIONS.values()) <= gpu.LIMIT < 600
    assert set(gpu.MEASURE) == set(gpu.SECTIONS)


def test_tests_that_need_cuda_are_found_by_their_marker() -> None:
    names = {path.name for path in gpu.find_marked()}
    assert {"test_decoding.py", "test_loader.py", "test_resizing.py"} <= names and "test_dataset.py" not in names


def test_it_is_no_part_of_the_table_of_ratios() -> None:
    assert "gpu" not in program.NAMES


def test_what_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for given, message in (
        (["--only", "mea"], "unknown section mea; available: peak"),
        (["--device", "cpu"], "--quick"),
    ):
        with pytest.raises(SystemExit):
            gpu.parse_arguments(given)
        assert message in capsys.readouterr().err
    monkeypatch.setattr(gpu, "_has_cuda", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA GPU"):
        gpu.main([])
