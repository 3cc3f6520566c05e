"""The measured cost is that of the command, without that of the process which started it."""

import os
import sys

import pytest

from benchmarks._processes import run_measured

MB = 10**6


def run(tmp_path, code, **options):
    return run_measured([sys.executable, "-I", "-S", "-c", code], tmp_path / "printed", **options)


def test_memory_and_time_are_the_commands_own(tmp_path):
    buffer = os.urandom(300 * MB)  # in this process, like the libraries of a benchmark
    idle = run(tmp_path, "pass")
    busy = run(tmp_path, "import time; buffer = bytes(range(250)) * 400_000; end = time.process_time() + 0.3\n"
               "while time.process_time() < end: pass")  # fmt: skip
    assert len(buffer) == 300 * MB
    assert idle.memory < 60
    assert 90 <= busy.memory - idle.memory < 140
    assert busy.cpu - idle.cpu >= 0.29
    assert busy.wall >= 0.29


def test_folder_and_environment_reach_the_command(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    run(tmp_path, "import os; print(os.getcwd(), os.environ['NAME'])", folder=folder, environment={"NAME": "value"})
    assert (tmp_path / "printed").read_text().split() == [str(folder.resolve()), "value"]


def test_the_error_of_a_failed_command_contains_its_output(tmp_path):
    with pytest.raises(RuntimeError, match=r"(?s)ended with status 3.*it broke"):
        run(tmp_path, "import sys; print('it broke'); sys.exit(3)")
