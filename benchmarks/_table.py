"""What a benchmark hands over: rows of one table, each a ratio to a peer or a bare limit measured in the same run."""

import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

ROWS = "STM_BENCHMARK_ROWS"
"""The environment variable that names the file for the rows, set by `python -m benchmarks`."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    speed: str  # ours, with its unit
    ratio: float | None  # to `against`, the median of the rounds; None: a figure without a peer
    low: float | None  # least and largest of the rounds
    high: float | None
    against: str  # peer or limit, with its own speed
    aim: str = ""


def compare(what: str, speed: str, mine: Sequence[float], theirs: Sequence[float], against: str, aim: str = "") -> Row:
    """A row of ratios mine / theirs of neighbouring turns: a shared machine's drift is in both of them."""
    ratios = [m / t for m, t in zip(mine, theirs, strict=True)]
    return Row(what, speed, statistics.median(ratios), min(ratios), max(ratios), against, aim)


def take_turns(work: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each piece of work returns in each of the rounds, one after the other; a first turn of all warms up."""
    found: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(rounds + 1):
        for name, one in work.items():
            value = one()
            if turn:
                found[name].append(value)
    return found


def cpu_seconds(work: Callable[[], object]) -> float:
    """CPU time of all threads: the one to compare on a shared machine, where wall-clock time is anybody's."""
    begin = time.process_time()
    work()
    return time.process_time() - begin


def wall_seconds(work: Callable[[], object]) -> float:
    """Wall-clock time, with the GPU's work done."""
    _settle()
    begin = time.perf_counter()
    work()
    _settle()
    return time.perf_counter() - begin


def _settle() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def report(rows: Sequence[Row]) -> None:
    """Prints the rows, and leaves them where `python -m benchmarks` looks for them."""
    print("\n" + render(rows), flush=True)
    if path := os.environ.get(ROWS):
        Path(path).write_text(json.dumps([asdict(row) for row in rows]))


def render(rows: Sequence[Row]) -> str:
    """A Markdown table."""
    lines = ["| what | speed | ratio | from | to | against | aim |", "|---|---:|---:|---:|---:|---|---|"]
    for row in rows:
        numbers = " | ".join(_show(value) for value in (row.ratio, row.low, row.high))
        lines.append(f"| {row.what} | {row.speed} | {numbers} | {row.against} | {row.aim} |")
    return "\n".join(lines)


def _show(value: float | None) -> str:
    """A ratio; shares that masks have of a step are fractions of a per cent."""
    return "" if value is None else f"{value:.2f}" if value >= 0.1 else f"{value:.4f}"
