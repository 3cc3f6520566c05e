"""Run a stage on many damaged inputs and classify the outcome of each run."""

import faulthandler
import hashlib
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from damage import Damage, damage_bytes, damage_table

from stm.jobs.status import Status
from stm.jobs.workers import Failure
from stm.storage.tables import DamagedError, read_table

Rows = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Stage:
    """A stage that reads files written by earlier stages."""

    name: str
    folder: Path  # the test's; its subfolder `outputs` is the stage's
    inputs: Mapping[str, Path]
    run: Callable[[Path], object]  # takes an empty folder for its outputs
    tables: Sequence[str] = ()  # outputs with one row per clip, whose `status` may report the damage
    verify: Callable[[], bool] | None = None  # whether `stm verify` refuses the inputs
    refusals: tuple[type[Exception], ...] = (DamagedError,)


@dataclass
class Tally:
    """Counts of the runs' outcomes."""

    stage: str
    counts: dict[str, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def add(self, outcome: str) -> None:
        self.counts[outcome] = self.counts.get(outcome, 0) + 1

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def __str__(self) -> str:
        parts = ", ".join(f"{number} {outcome}" for outcome, number in sorted(self.counts.items()))
        return f"| {self.stage} | {self.total} | {parts} |"


def run_here(function: Callable[[Any], Any], items: Sequence[Any], *_: Any) -> Iterator[tuple[int, Any]]:
    """`run_isolated` in this process, because starting processes for hundreds of runs would take too long."""
    for index, item in enumerate(items):
        try:
            yield index, function(item)
        except OSError:
            raise
        except Exception as error:
            yield index, Failure(Status.CRASHED, f"{type(error).__name__}: {error}")


class Hang(BaseException):
    """A stage did not end. Derived from BaseException so that no stage catches it."""


@contextmanager
def deadline(seconds: float = 600) -> Iterator[None]:
    """End the test if the block hangs; if it hangs in native code, end all tests."""

    def give_up(*_: object) -> None:
        raise Hang(f"not finished after {seconds} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    assert sys.__stderr__ is not None
    faulthandler.dump_traceback_later(2 * seconds, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        faulthandler.cancel_dump_traceback_later()


def snapshot(folder: Path, excluded: Path) -> dict[str, tuple[int, int, int]]:
    """Size, modification time and inode of every file below a folder, except those below `excluded`."""
    states = {}
    for path in folder.rglob("*"):
        if not path.is_relative_to(excluded):
            state = path.lstat()
            states[path.relative_to(folder).as_posix()] = (state.st_size, state.st_mtime_ns, state.st_ino)
    return states


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, journals excepted, by relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and ".journal" not in path.as_posix())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def sample_cases(stage: Stage, count: int, seed: int = 0) -> list[tuple[str, Damage]]:
    """`count` damaged inputs by name: damaged bytes of all inputs in turn, and damaged tables."""
    rng = np.random.default_rng([seed, len(stage.name)])
    good = {name: path.read_bytes() for name, path in stage.inputs.items()}
    streams = {name: damage_bytes(data, rng) for name, data in good.items()}
    names = sorted(good)
    damaged = [(name, damage) for _ in range(count) for name in names for damage in islice(streams[name], 1)][
        : count // 2
    ]
    tables = [(n, d) for n in names if stage.inputs[n].suffix == ".parquet" for d in damage_table(good[n])]
    sampled = rng.permutation(len(tables))[: count - len(damaged)]
    damaged += [tables[number] for number in sampled]
    return (
        damaged + [(n, d) for _ in range(count) for n in names for d in islice(streams[n], 1)][: count - len(damaged)]
    )


def try_all(stage: Stage, count: int) -> Tally:
    """Run a stage on `count` damaged inputs.

    A run must produce the outputs of the good input; or raise an error that names one of the inputs and leave no output;
    or write tables in which the rows of the affected clips report the damage. Nothing else may be written.
    """
    good_folder = stage.folder / "good"
    good_folder.mkdir()
    stage.run(good_folder)
    tally, good = Tally(stage.name), digests(good_folder)
    assert good, "the stage wrote nothing"
    outputs = stage.folder / "outputs"
    for number, (name, damage) in enumerate(sample_cases(stage, count)):
        path = stage.inputs[name]
        original = path.read_bytes()
        path.write_bytes(damage.data)
        output = outputs / f"{number:04d}"
        output.mkdir(parents=True)
        before = snapshot(stage.folder, outputs)
        with deadline():
            outcome = _classify(stage, output, damage, good_folder, good)
        tally.add(outcome if not outcome.startswith("WRONG") else "wrong")
        if outcome.startswith("WRONG"):
            tally.wrong.append(f"{number}: {name}: {damage.kind}: {outcome}")
        assert snapshot(stage.folder, outputs) == before, f"{name}: {damage.kind}: wrote outside of the outputs"
        path.write_bytes(original)
    return tally


def _classify(stage: Stage, output: Path, damage: Damage, good_folder: Path, good: Mapping[str, str]) -> str:
    try:
        stage.run(output)
    except stage.refusals as error:
        left = digests(output)
        if left:
            return f"WRONG: left {sorted(left)} after {error}"
        named = any(str(path) in str(error) for path in stage.inputs.values())
        return "refused by name" if named else f"WRONG: the error names no file: {error}"
    except Exception as error:
        return f"WRONG: {type(error).__name__}: {error}"
    if digests(output) == good:
        return "no difference"
    if stage.tables and all(_listed(good_folder / table, output / table) for table in stage.tables):
        return "listed in the table"
    if stage.verify is not None and stage.verify():
        return "detected by `stm verify` only"
    return "accepted" if not damage.strict else "WRONG: a different result without an error"


def _listed(good: Path, output: Path) -> bool:
    """Whether each row equals that of the good input or reports the damage."""
    expected = {row["key"]: row for row in read_table(good).to_pylist()}
    rows = {row["key"]: row for row in read_table(output).to_pylist()}
    changed = [row for key, row in rows.items() if repr(row) != repr(expected.get(key))]
    return rows.keys() == expected.keys() and all(row["status"] != "ok" and row["detail"] for row in changed)
