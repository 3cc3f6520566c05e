"""Commands of their own, measured: wall-clock time, CPU time and peak memory of each."""

import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple


class Cost(NamedTuple):
    """What a command took, together with the processes that it started and waited for."""

    wall: float  # seconds
    cpu: float  # seconds, user and system
    memory: float  # MB: the largest resident set of any one of the processes


def run_measured(
    command: Sequence[str], printed: Path, folder: Path | None = None, environment: Mapping[str, str] | None = None
) -> Cost:
    """Runs a command to its end.

    Args:
        printed: written: what the command printed, to both channels.
        folder: where it starts.
        environment: variables set beside those of this process.

    Raises:
        RuntimeError: it ended with another status than 0; with the end of what it printed.
    """
    with printed.open("wb") as sink:
        begin = time.perf_counter()
        process = subprocess.Popen(
            command, cwd=folder, env={**os.environ, **(environment or {})}, stdout=sink, stderr=subprocess.STDOUT
        )
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - begin
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        end = printed.read_text(errors="replace")[-4000:]
        raise RuntimeError(f"{' '.join(command)} ended with status {process.returncode}:\n{end}")
    # Linux counts in KiB; macOS in bytes.
    unit = 1 if os.uname().sysname == "Darwin" else 1024
    return Cost(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * unit / 1e6)
