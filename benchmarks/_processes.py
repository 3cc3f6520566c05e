"""Measure the wall-clock time, CPU time and peak memory of a command in a process of its own."""

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
    """Cost of a command, including the processes that it started and waited for."""

    wall: float  # seconds
    cpu: float  # seconds, user and system
    memory: float  # MB: the largest resident set of any of the processes


def run_measured(
    command: Sequence[str], printed: Path, folder: Path | None = None, environment: Mapping[str, str] | None = None
) -> Cost:
    """Run a command to its end and return its cost.

    Args:
        printed: file to write the command's standard output and standard error to.
        folder: working directory.
        environment: variables to set in addition to those of this process.

    Raises:
        RuntimeError: the command ended with a status other than 0; the message contains the end of its output.
    """
    with tempfile.TemporaryDirectory() as temporary, printed.open("wb") as output:
        usage = Path(temporary) / "usage.json"
        starter = [sys.executable, "-I", "-S", str(STARTER), str(usage)]
        variables = {**os.environ, **(environment or {})}
        subprocess.run(
            [*starter, *command], cwd=folder, env=variables, stdout=output, stderr=subprocess.STDOUT, check=True
        )
        wall, cpu, memory, status = json.loads(usage.read_text())
    if status:
        end = printed.read_text(errors="replace")[-4000:]
        raise RuntimeError(f"{' '.join(command)} ended with status {status}:\n{end}")
    # Linux reports KiB, macOS bytes.
    unit = 1 if os.uname().sysname == "Darwin" else 1024
    return Cost(wall, cpu, memory * unit / 1e6)
