"""Items that hang or crash do not affect other items."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from stm.jobs.status import Status
from stm.jobs.workers import Failure, run_isolated

# The function must be in a module that a child process can import, so the fixture writes one.
MODULE = """
import ctypes, os, signal, time

def act(item):
    kind, value = item
    if kind == "square":
        return value * value
    if kind == "hang":  # native code that holds the interpreter lock and ignores SIGTERM
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        ctypes.PyDLL(None).sleep(600)
    if kind == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if kind == "raise":
        raise KeyError("odd clip")
    if kind == "exit":
        os._exit(3)
    if kind == "disk":
        raise OSError(28, "No space left on device")
    if kind == "pid":
        return os.getpid()
"""


@pytest.fixture
def act(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "acts_for_workers.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    import acts_for_workers  # type: ignore[import-not-found]

    yield acts_for_workers.act
    sys.modules.pop("acts_for_workers")


@pytest.mark.slow
def test_hanging_and_crashing_items_are_reported_and_all_others_finish(act) -> None:
    items = [
        ("square", 2),
        ("hang", 0),
        ("segfault", 0),
        ("raise", 0),
        ("exit", 0),
        *(("square", n) for n in range(20)),
    ]
    outcomes = dict(run_isolated(act, items, processes=2, timeout_seconds=1.5))
    assert sorted(outcomes) == list(range(len(items)))
    assert [outcomes[0], *[outcomes[5 + n] for n in range(20)]] == [4, *[n * n for n in range(20)]]
    assert isinstance(outcomes[1], Failure) and outcomes[1].status is Status.TIMEOUT
    assert [outcomes[i].status for i in (2, 3, 4)] == [Status.CRASHED] * 3
    assert "SIGSEGV" in outcomes[2].detail
    assert "odd clip" in outcomes[3].detail
    assert "exit code 3" in outcomes[4].detail


def test_a_full_disk_stops_the_job_instead_of_failing_clips(act) -> None:
    with pytest.raises(OSError, match="No space left"):
        list(run_isolated(act, [("disk", 0)], processes=1, timeout_seconds=60))


def test_an_empty_list_of_items_yields_nothing(act) -> None:
    assert list(run_isolated(act, [], processes=4, timeout_seconds=60)) == []


def test_workers_end_when_the_caller_stops_early(act) -> None:
    outcomes = run_isolated(act, [("pid", 0)] * 3, processes=1, timeout_seconds=60)
    _, pid = next(outcomes)
    assert isinstance(pid, int)
    outcomes.close()  # type: ignore[attr-defined]
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_script_without_a_main_guard_is_not_run_again_in_the_workers(act, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
        import acts_for_workers
        from stm.jobs.workers import run_isolated
        print("started", flush=True)
        print(sorted(run_isolated(acts_for_workers.act, [("square", 3)], 1, 60)), flush=True)
        """)
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(__file__).parents[3])])}
    completed = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=60
    )
    assert completed.stdout == "started\n[(0, 9)]\n", completed.stderr


def test_a_function_of_the_main_script_is_rejected_with_a_reason() -> None:
    def local(item: int) -> int:
        return item

    local.__module__ = "__main__"
    with pytest.raises(ValueError, match="main script"):
        list(run_isolated(local, [1], 1, 60))


@pytest.mark.slow
def test_workers_end_when_their_parent_is_killed(act, tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        "import time, acts_for_workers\nfrom stm.jobs.workers import run_isolated\n"
        "for _, pid in run_isolated(acts_for_workers.act, [('pid', 0), ('square', 0)], 1, 600):\n"
        "    print(pid, flush=True)\n    time.sleep(600)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(__file__).parents[3])])}
    with subprocess.Popen([sys.executable, str(script)], env=environment, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        if state == "Z":
            return
        time.sleep(0.1)
    assert not Path(f"/proc/{pid}").exists()
