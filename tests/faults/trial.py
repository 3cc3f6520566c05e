"""Runs a stage on one damaged input after another, and judges how each run ended."""

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
    """A stage that reads files which the system itself wrote."""

    name: str
    folder: Path  # of all that the test has; `outputs` in it is the stage's
    inputs: Mapping[str, Path]
    run: Callable[[Path], object]  # given an empty folder for its outputs
    tables: Sequence[str] = ()  # outputs with a row a clip, whose `status` may say what was wrong
    verify: Callable[[], bool] | None = None  # whether `stm verify` refuses the inputs
    refusals: tuple[type[Exception], ...] = (DamagedError,)


@dataclass
class Tally:
    """How the runs ended, by what became of the input."""

    stage: str
    counts: dict[str, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def add(self, ending: str) -> None:
        self.counts[ending] = self.counts.get(ending, 0) + 1

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def __str__(self) -> str:
        parts = ", ".join(f"{number} {ending}" for ending, number in sorted(self.counts.items()))
        return f"| {self.stage} | {self.total} | {parts} |"


def run_here(function: Callable[[Any], Any], items: Sequence[Any], *_: Any) -> Iterator[tuple[int, Any]]:
    """`run_isolated` without processes, for many runs in a short time."""
    for index, item in enumerate(items):
        try:
            yield index, function(item)
        except OSError:
            raise
        except Exception as error:
            yield index, Failure(Status.CRASHED, f"{type(error).__name__}: {error}")


class Hang(BaseException):
    """A stage did not end. No stage catches it."""


@contextmanager
def deadline(seconds: float = 600) -> Iterator[None]:
    """Ends the test where the block hangs; where that is in native code, ends all tests."""

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


def snapshot(folder: Path, but: Path) -> dict[str, tuple[int, int, int]]:
    """Every file under a folder, with its size and times, except those under `but`."""
    found = {}
    for path in folder.rglob("*"):
        if not path.is_relative_to(but):
            state = path.lstat()
            found[path.relative_to(folder).as_posix()] = (state.st_size, state.st_mtime_ns, state.st_ino)
    return found


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and ".journal" not in path.as_posix())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def draw_cases(stage: Stage, count: int, seed: int = 0) -> list[tuple[str, Damage]]:
    """`count` damaged inputs: bytes of all inputs in turn, and what can be wrong with tables."""
    draw = np.random.default_rng([seed, len(stage.name)])
    good = {name: path.read_bytes() for name, path in stage.inputs.items()}
    streams = {name: damage_bytes(data, draw) for name, data in good.items()}
    names = sorted(good)
    damaged = [(name, damage) for _ in range(count) for name in names for damage in islice(streams[name], 1)][
        : count // 2
    ]
    tables = [(n, d) for n in names if stage.inputs[n].suffix == ".parquet" for d in damage_table(good[n])]
    picked = draw.permutation(len(tables))[: count - len(damaged)]
    damaged += [tables[number] for number in picked]
    return (
        damaged + [(n, d) for _ in range(count) for n in names for d in islice(streams[n], 1)][: count - len(damaged)]
    )


def try_all(stage: Stage, count: int) -> Tally:
    """Runs a stage on `count` damaged inputs.

    A run must end in the outputs of the good input; or in an error that names one of the inputs and leaves no output; or
    in tables where the rows of the clips concerned say what is wrong. Nothing else may be written.
    """
    good_folder = stage.folder / "good"
    good_folder.mkdir()
    stage.run(good_folder)
    tally, good = Tally(stage.name), digests(good_folder)
    assert good, "the stage writes something"
    outputs = stage.folder / "outputs"
    for number, (name, damage) in enumerate(draw_cases(stage, count)):
        path = stage.inputs[name]
        whole = path.read_bytes()
        path.write_bytes(damage.data)
        output = outputs / f"{number:04d}"
        output.mkdir(parents=True)
        before = snapshot(stage.folder, outputs)
        with deadline():
            ending = _judge(stage, output, damage, good_folder, good)
        tally.add(ending if not ending.startswith("WRONG") else "wrong")
        if ending.startswith("WRONG"):
            tally.wrong.append(f"{number}: {name}: {damage.kind}: {ending}")
        assert snapshot(stage.folder, outputs) == before, f"{name}: {damage.kind}: written outside of the outputs"
        path.write_bytes(whole)
    return tally


def _judge(stage: Stage, output: Path, damage: Damage, good_folder: Path, good: Mapping[str, str]) -> str:
    try:
        stage.run(output)
    except stage.refusals as error:
        left = digests(output)
        if left:
            return f"WRONG: {sorted(left)} left after {error}"
        named = any(str(path) in str(error) for path in stage.inputs.values())
        return "refused by name" if named else f"WRONG: names no file: {error}"
    except Exception as error:
        return f"WRONG: {type(error).__name__}: {error}"
    if digests(output) == good:
        return "no difference"
    if stage.tables and all(_listed(good_folder / table, output / table) for table in stage.tables):
        return "listed in the table"
    if stage.verify is not None and stage.verify():
        return "found by `stm verify` only"
    return "believed" if not damage.strict else "WRONG: another result without a word"


def _listed(good: Path, found: Path) -> bool:
    """Whether each row is that of the good input or says what is wrong."""
    expected = {row["key"]: row for row in read_table(good).to_pylist()}
    rows = {row["key"]: row for row in read_table(found).to_pylist()}
    odd = [row for key, row in rows.items() if repr(row) != repr(expected.get(key))]
    return rows.keys() == expected.keys() and all(row["status"] != "ok" and row["detail"] for row in odd)
