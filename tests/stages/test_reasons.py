"""What dry runs print: changed keys instead of whole settings, and the beginnings of long lists."""

import logging
import sys
from typing import Any

import pytest
from snakemake.persistence import ParamsChange

from stm.config import Config
from stm.stages.reasons import describe_change, list_failures, name_changed_keys, shorten_lists
from stm.stages.rules import describe_shared_cores

MADE: dict[str, Any] = {
    "runs.{run}": {"mask": {"strategy": "tube", "ratio": 0.9}, "seeds": []},
    "seed": 0,
    "*": {"frames": {"every": 4}},
}


@pytest.mark.parametrize(
    ("wanted", "printed"),
    [
        ({**MADE, "seed": 1}, "seed: 0 -> 1"),
        (
            {**MADE, "runs.{run}": {"mask": {"strategy": "tube", "ratio": 0.75}, "seeds": [1]}, "*": {"frames": {}}},
            "pretrain.{run}.mask.ratio: 0.9 -> 0.75, pretrain.{run}.seeds: [] -> [1], frames.every: 4 -> nothing",
        ),
        ({**MADE, "seed": "x" * 5000}, 'seed: 0 -> "' + "x" * 79 + "..."),
        (
            {**MADE, **{f"more{n}": n for n in range(10)}},
            ", ".join(f"more{n}: null -> {n}" for n in range(6)) + ", and 4 more",
        ),
    ],
)
def test_a_changed_key_is_named_with_both_values(wanted: dict[str, Any], printed: str) -> None:
    assert describe_change({repr(MADE)}, {repr(wanted)}) == printed


def test_texts_that_are_no_settings_are_hashed() -> None:
    described = describe_change({"<object>" * 1000}, {repr(MADE)})
    assert described.startswith("settings ") and len(described) < 40
    assert describe_change(set(), {repr(MADE)}).startswith("settings none -> ")


def test_snakemake_names_the_changed_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    changed = type("ParamsChange", (ParamsChange,), {})
    monkeypatch.setattr("snakemake.persistence.ParamsChange", changed)
    name_changed_keys()
    assert str(changed({repr(MADE)}, {repr({**MADE, "seed": 1})})) == "seed: 0 -> 1"


def test_a_snakemake_with_other_names_prints_its_own_text(monkeypatch: pytest.MonkeyPatch) -> None:
    class Renamed:
        def __str__(self) -> str:
            return "its own"

    monkeypatch.setattr("snakemake.persistence.ParamsChange", Renamed)
    name_changed_keys()
    assert str(Renamed()) == "its own"
    monkeypatch.delattr("snakemake.persistence.ParamsChange")
    name_changed_keys()
    monkeypatch.setitem(sys.modules, "snakemake.persistence", None)
    name_changed_keys()


def test_long_lists_are_shortened() -> None:
    files = [f"shards/train-{n:05d}.parquet" for n in range(10_000)]
    changed = f"Params have changed since last execution: a: [{'1, ' * 20}] -> []"
    record = logging.makeLogRecord(
        {
            "input": files,
            "output": files[:8],
            "reason": f"Missing output files: {', '.join(files)}; {changed}",
        }
    )
    assert shorten_lists(record)
    values = vars(record)
    assert values["input"] == [*files[:6], "and 9994 more"] and values["output"] == files[:8]
    assert values["reason"] == f"Missing output files: {', '.join(files[:6])}, and 9994 more; {changed}"
    assert shorten_lists(logging.makeLogRecord({"msg": "no job"}))


FAILURES = """
[Mon Nov 30 21:10:33 2026]
Error in rule manifest:
    message: None
    jobid: 0
    input: videos/a.csv
    log: results/shapes/logs/manifest.log (check log file(s) for error details)
[Mon Nov 30 21:10:34 2026]
Error in rule own:
    output: bad.txt
    shell:
        echo log: "no (check"
MissingOutputException in rule many in file "Snakefile", line 19:
Job 3  completed successfully, but some output files are missing.
Error in rule frames:
    log: logs/frames/a.log (check log file(s) for error details)
Error in rule frames:
    log: logs/frames/a.log (check log file(s) for error details)
"""


def test_failed_jobs_are_listed_once_with_their_logs() -> None:
    listed = "manifest (results/shapes/logs/manifest.log), own, many, frames (logs/frames/a.log)"
    assert list_failures(FAILURES) == f"Failed: {listed}"
    assert list_failures("3 of 3 steps (100%) done\n") == ""


def test_processes_that_share_a_cpu_are_named() -> None:
    values: dict[str, Any] = {"name": "x", "dataset": {"source": "moving-shapes"}, "pretrain": {"one": {}}}
    assert describe_shared_cores(Config.model_validate(values)) == ""
    values["pretrain"] |= {f"run{n}": {"processes": 2} for n in range(5)}
    described = describe_shared_cores(Config.model_validate(values))
    assert "pretrain.run0 (2), pretrain.run1 (2), pretrain.run2 (2) and 2 more" in described
    assert "processes: 1" in described and "pretrain.one" not in described
