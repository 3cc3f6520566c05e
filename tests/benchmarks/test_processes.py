"""What a command took is what it took itself, not what the process that asked had taken before."""

import os
import sys

import pytest

from benchmarks._processes import run_measured

MB = 10**6


def run(tmp_path, code, **options):
    return run_measured([sys.executable, "-I", "-S", "-c", code], tmp_path / "printed", **options)


def test_memory_and_time_are_the_commands_own(tmp_path):
    held = os.urandom(300 * MB)  # by this process, as a benchmark holds its libraries
    idle = run(tmp_path, "pass")
    busy = run(tmp_path, "import time; held = bytes(range(250)) * 400_000; end = time.process_time() + 0.3\n"
               "while time.process_time() < end: pass")  # fmt: skip
    assert len(held) == 300 * MB
    assert idle.memory < 60
    assert 90 <= busy.memory - idle.memory < 140
    assert busy.cpu - idle.cpu >= 0.29
    assert busy.wall >= 0.29


def test_it_runs_where_and_with_what_it_is_told(tmp_path):
    place = tmp_path / "place"
    place.mkdir()
    run(tmp_path, "import os; print(os.getcwd(), os.environ['SAID'])", folder=place, environment={"SAID": "so"})
    assert (tmp_path / "printed").read_text().split() == [str(place.resolve()), "so"]


def test_a_command_that_fails_is_said_with_its_words(tmp_path):
    with pytest.raises(RuntimeError, match=r"(?s)ended with status 3.*it broke"):
        run(tmp_path, "import sys; print('it broke'); sys.exit(3)")
