"""Logging of a run: running means of its losses, `metrics.jsonl`, and the trackers that show its values."""

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch

from stm.distributed.process import Process
from stm.storage.files import name_file_in_disk_errors, write_bytes
from stm.training.trackers import TENSORBOARD, Line, Tracker, open_trackers


class Meter:
    """Running means of named losses. They stay on the device, so that the host waits for it only when they are read."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._sums: dict[str, torch.Tensor] = {}
        self._weights: dict[str, float] = {}

    def add(self, values: Mapping[str, torch.Tensor]) -> None:
        """Adds scalars of one forward pass."""
        for name, value in values.items():
            # In float64: a float32 sum of many losses would lose digits that the log shows.
            zero = torch.zeros((), dtype=torch.float64, device=value.device)
            self._sums[name] = self._sums.get(name, zero) + value.detach().double()
            self._weights[name] = self._weights.get(name, 0.0) + 1.0

    def read(self) -> dict[str, float]:
        """Means over all processes and the passes since the last reading, which are then reset. Waits for the device."""
        names = sorted(self._sums)
        if not names:
            return {}
        means = self._process.mean(torch.stack([self._sums[n] / self._weights[n] for n in names]))
        self._sums = {}
        self._weights = {}
        return dict(zip(names, means.tolist(), strict=True))

    def finite(self) -> bool:
        """Whether all values since the last reading were finite: a single NaN or inf makes its sum non-finite."""
        return not self._sums or bool(torch.stack(list(self._sums.values())).isfinite().all().item())

    def state(self) -> dict[str, list[float | torch.Tensor]]:
        """The sums not yet read, averaged over the processes, so that any number of processes can resume from them."""
        return {name: [self._weights[name], self._process.mean(value).cpu()] for name, value in self._sums.items()}

    def restore(self, state: Mapping[str, list[float | torch.Tensor]], device: torch.device) -> None:
        self._weights = {name: float(weight) for name, (weight, _) in state.items()}
        self._sums = {name: torch.as_tensor(value).to(device) for name, (_, value) in state.items()}


class Clock:
    """Items per second since the last reading; earlier attempts of the run do not count."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._items = 0

    def add(self, items: int) -> None:
        self._items += items

    def read(self) -> float:
        now = time.perf_counter()
        rate = self._items / max(now - self._start, 1e-9)
        self._start = now
        self._items = 0
        return rate


def cut_lines(path: Path, step: int) -> list[Line]:
    """Drops the lines of a `metrics.jsonl` after `step`, so that a resumed run's log equals an uninterrupted one's.

    Returns:
        The lines that are kept.
    """
    kept = []
    lines: list[Line] = []
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
        try:
            values = json.loads(line)
            if values["step"] <= step and line.endswith(b"\n"):
                kept.append(line)
                lines.append((values.pop("step"), values))
        except (ValueError, KeyError):  # the last line of a run that was killed while writing it
            break
    write_bytes(path, b"".join(kept))
    return lines


class MetricsLog:
    """Writes `metrics.jsonl` (flushed line by line) and logs to the trackers, in the first process only.

    Args:
        folder: where `metrics.jsonl` is written, and what belongs to the trackers.
        step: number of finished steps; entries that an earlier attempt wrote for later steps are removed.
        trackers: names as in the config's `trackers`.
        title: the name of the run, for trackers.
        config: the settings of the run as JSON values, for trackers.
    """

    def __init__(
        self,
        folder: Path,
        step: int,
        process: Process,
        trackers: Sequence[str] = TENSORBOARD,
        title: str = "",
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self._file: TextIO | None = None
        self._trackers: list[Tracker] = []
        self._folder = folder
        if not process.first:
            return
        folder.mkdir(parents=True, exist_ok=True)
        lines = cut_lines(folder / "metrics.jsonl", step)
        self._file = (folder / "metrics.jsonl").open("a", encoding="utf-8")
        self._trackers = open_trackers(trackers, folder, title, config or {}, step, lines)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if self._file is None:
            return
        rounded = {name: _round(value) for name, value in values.items()}
        with name_file_in_disk_errors(self._folder / "metrics.jsonl"):
            self._file.write(json.dumps({"step": step, **rounded}, allow_nan=False) + "\n")
            self._file.flush()
        for tracker in self._trackers:
            tracker.log(step, rounded)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()
        for tracker in self._trackers:
            tracker.close(finished=exception[0] is None)


def _round(value: float, digits: int = 7) -> float:
    """Round to `digits` significant digits: float32 has no more, and lines stay short."""
    if value == 0 or not math.isfinite(value):
        return value
    return round(value, digits - 1 - math.floor(math.log10(abs(value))))
