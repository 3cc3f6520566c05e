"""The table of the benchmarks: ratios, parts that fail, and the record of a day."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import __main__ as program
from benchmarks._table import ROWS, Row, compare, render, take_turns

WRITE = f"import os, json; open(os.environ['{ROWS}'], 'w').write(json.dumps([{{}}])); print('printed')"


def test_ratios_are_taken_within_a_round_and_their_median_is_reported() -> None:
    row = compare("a", "1/s", [2.0, 30.0, 4.0], [1.0, 10.0, 4.0], "b")
    assert (row.ratio, row.low, row.high) == (2.0, 1.0, 3.0)  # the ratio of the medians would be 1
    assert "| a | 1/s | 2.00 | 1.00 | 3.00 | b |" in render([row, Row("c", "", None, None, None, "")])


def test_the_first_turn_warms_up_and_turns_alternate() -> None:
    calls: list[str] = []
    work = {name: lambda name=name: float(calls.append(name) or len(calls)) for name in "ab"}
    assert take_turns(work, 2) == {"a": [3.0, 5.0], "b": [4.0, 6.0]}
    assert calls == list("ababab")


def test_a_part_returns_its_rows_and_its_output() -> None:
    result = program.run_part("example", [sys.executable, "-c", WRITE], None)
    assert (result["status"], result["rows"], result["printed"]) == (0, [{}], "printed\n")


def test_threads_reach_the_part() -> None:
    code = "import os; print(os.environ['OMP_NUM_THREADS'], os.environ['MALLOC_TRIM_THRESHOLD_'])"
    assert program.run_part("example", [sys.executable, "-c", code], 3)["printed"].startswith("3 ")


def test_a_part_that_fails_is_named_and_the_others_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = json.dumps([vars(compare("fine", "1/s", [2.0], [1.0], "peer"))])
    codes = {"loader": "raise SystemExit(3)", "motion": f"import os; open(os.environ['{ROWS}'], 'w').write({rows!r})"}
    monkeypatch.setattr(program, "make_command", lambda name, *_: [sys.executable, "-c", codes[name]])
    arguments = ["--only", "motion,loader", "--device", "cpu", "--output", str(tmp_path)]
    assert program.main(arguments) == 1
    assert "failed: loader" in capsys.readouterr().err
    record = program.name_record(tmp_path, "cpu")
    table = record.with_suffix(".md").read_text()
    assert "| fine | 1/s | 2.00 |" in table and "ended with status 3" in table and "processor: " in table

    # A part that is run again replaces its own rows only.
    codes["loader"] = "print('now')"
    assert program.main(["loader", "--device", "cpu", "--output", str(tmp_path)]) == 0
    parts = json.loads(record.read_text())["parts"]
    assert parts["loader"]["printed"] == "now\n" and parts["motion"]["rows"][0]["what"] == "fine"


def test_a_record_of_another_machine_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program.save_record(tmp_path, "cpu", program.open_record(tmp_path, "cpu"))
    monkeypatch.setattr(program, "describe", lambda: {"processor": "another"})
    with pytest.raises(SystemExit, match="another machine"):
        program.open_record(tmp_path, "cpu")


def test_unknown_parts_are_refused_with_the_names(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        program.parse_arguments(["--only", "loder"])
    assert "unknown benchmark loder; available: similarity" in capsys.readouterr().err


def test_rounds_are_passed_to_the_parts_that_accept_them() -> None:
    arguments = program.parse_arguments(["--rounds", "2"])
    # One runs each size once, the others measure no speed.
    for name in set(program.NAMES) - {"growth", "memory", "dense"}:
        command = program.make_command(name, "cpu", arguments)
        assert command[-2:] == ["--rounds", "2"], name
