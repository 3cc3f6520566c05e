"""Commands of their own, measured: wall-clock time, CPU time and peak memory of each."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

STARTER = Path(__file__).with_name("_usage.py")


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
    with tempfile.TemporaryDirectory() as place, printed.open("wb") as sink:
        usage = Path(place) / "usage.json"
        starter = [sys.executable, "-I", "-S", str(STARTER), str(usage)]
        shown = {**os.environ, **(environment or {})}
        subprocess.run([*starter, *command], cwd=folder, env=shown, stdout=sink, stderr=subprocess.STDOUT, check=True)
        wall, cpu, memory, status = json.loads(usage.read_text())
    if status:
        end = printed.read_text(errors="replace")[-4000:]
        raise RuntimeError(f"{' '.join(command)} ended with status {status}:\n{end}")
    # Linux counts in KiB; macOS in bytes.
    unit = 1 if os.uname().sysname == "Darwin" else 1024
    return Cost(wall, cpu, memory * unit / 1e6)
