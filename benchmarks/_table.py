"""The rows that a benchmark reports, each a ratio to a peer or to a lower bound measured in the same run."""

import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

ROWS = "STM_BENCHMARK_ROWS"
"""Environment variable with the file to write rows to, set by `python -m benchmarks`."""


@dataclass(frozen=True)
class Row:
    """One row of the table. The fields are the keys in recorded JSON files."""

    what: str
    speed: str  # ours, with its unit
    ratio: float | None  # to `against`, median over rounds; None: there is no peer
    low: float | None  # minimum and maximum over rounds
    high: float | None
    against: str  # peer or bound, with its speed
    aim: str = ""


def compare(what: str, speed: str, ours: Sequence[float], theirs: Sequence[float], against: str, aim: str = "") -> Row:
    """A row of the ratios ours / theirs, one per round: both values of a round are measured under the same machine load."""
    ratios = [our / their for our, their in zip(ours, theirs, strict=True)]
    return Row(what, speed, statistics.median(ratios), min(ratios), max(ratios), against, aim)


def take_turns(work: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Call all functions alternately, once per round, and return their results by name; an extra first round warms up."""
    results: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(rounds + 1):
        for name, function in work.items():
            value = function()
            if turn:
                results[name].append(value)
    return results


def cpu_seconds(work: Callable[[], object]) -> float:
    """CPU time of all threads: the time to compare on a shared machine, where wall-clock time depends on other load."""
    begin = time.process_time()
    work()
    return time.process_time() - begin


def wall_seconds(work: Callable[[], object]) -> float:
    """Wall-clock time until the GPU, too, has finished."""
    _synchronize()
    begin = time.perf_counter()
    work()
    _synchronize()
    return time.perf_counter() - begin


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def report(rows: Sequence[Row]) -> None:
    """Print the rows and write them to the file that `python -m benchmarks` reads."""
    print("\n" + render(rows), flush=True)
    if path := os.environ.get(ROWS):
        Path(path).write_text(json.dumps([asdict(row) for row in rows]))


def render(rows: Sequence[Row]) -> str:
    """A Markdown table."""
    lines = ["| benchmark | speed | ratio | min | max | compared with | target |", "|---|---:|---:|---:|---:|---|---|"]
    for row in rows:
        numbers = " | ".join(_show(value) for value in (row.ratio, row.low, row.high))
        lines.append(f"| {row.what} | {row.speed} | {numbers} | {row.against} | {row.aim} |")
    return "\n".join(lines)


def _show(value: float | None) -> str:
    """A ratio with 2 decimals; below 0.1 with 4, because a mask takes only a fraction of a per cent of a step."""
    return "" if value is None else f"{value:.2f}" if value >= 0.1 else f"{value:.4f}"
