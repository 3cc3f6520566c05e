"""Whatever ends a job ends it within seconds, with its message and a status, and nothing of it is left running."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).with_name("ending_jobs.py")
HELPERS = Path(__file__).parents[1] / "helpers"

# The status of each job and a part of its message. Python's exit status for an uncaught error is 1.
ENDS = {
    "not_finite": (1, "FloatingPointError: pretrain run: the loss or the gradient was not finite"),
    "damaged": (1, "clip-011"),
    "loader_killed": (
        1,
        "RuntimeError: a loading process ended; unless its message is above, the job or the machine ran out",
    ),
    "not_writable": (1, "checkpoints"),
    "interrupted": (1, "KeyboardInterrupt"),
    "left": (7, ""),
    "killed": (-9, ""),
    "not_sendable": (1, "Can't pickle"),
    "stuck": (143, "SIGTERM: saved after step"),
    "probe": (1, "clip-011"),
    "language": (1, "clip-011"),
}


def end_jobs(folder: Path, *cases: str, before: tuple[str, ...] = ()) -> dict[str, Any]:
    """Runs the cases of `ending_jobs.py` and returns how each ended."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(HELPERS)]), "OMP_NUM_THREADS": "1"}
    command = [*before, sys.executable, str(PROGRAM), str(folder), *cases]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ends")
    return folder, end_jobs(folder, *ENDS)


@pytest.mark.slow
@pytest.mark.parametrize("case", ENDS)
def test_a_job_ends_with_its_message_and_a_status_and_leaves_nothing(
    case: str, ends: tuple[Path, dict[str, Any]]
) -> None:
    folder, found = ends
    status, message = ENDS[case]
    messages = (folder / case / "messages.txt").read_text()
    assert found[case]["status"] == status, messages
    assert message in messages
    assert found[case]["left"] == 0
    # Nor does it complain about the loading processes that it has ended itself.
    assert ("DataLoader worker (pid" in messages) == (case in ("loader_killed", "not_sendable"))


@pytest.mark.slow
def test_a_full_shared_memory_is_called_full_with_its_size_and_what_to_do(tmp_path: Path) -> None:
    """In a mount namespace of its own, as containers have it."""
    mount = 'mount -t tmpfs -o size=200k tmpfs /dev/shm && exec "$@"'
    before = ("unshare", "--mount", "sh", "-c", mount, "sh")
    if subprocess.run([*before, "true"], check=False, capture_output=True).returncode:
        pytest.skip("mounts are not permitted here")
    found = end_jobs(tmp_path, "large_batches", before=before)
    messages = (tmp_path / "large_batches/messages.txt").read_text()
    assert found["large_batches"]["status"] == 1 and found["large_batches"]["left"] == 0
    assert "/dev/shm is full (0.2 MB in total, " in messages and "--shm-size" in messages
