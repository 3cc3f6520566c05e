"""Items that hang or crash do not affect other items."""

import errno
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from stm.jobs.status import Status
from stm.jobs.workers import Failure, ItemKilledError, WorkerStartError, run_isolated

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
    if kind == "memory":
        raise MemoryError("too large")
    if kind == "av":
        import av
        av.error.err_check(-value)
    if kind == "kill":
        os.kill(os.getpid(), value)
    if kind == "once":  # the first attempt fails in one of the ways above
        marker, way = value
        try:
            os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return "second attempt"
        return act(way)
    if kind == "slow":
        time.sleep(0.2)
        return value
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


@pytest.mark.parametrize("way", [("kill", 9), ("kill", 11), ("memory", 0), ("hang", 0)], ids=str)
def test_what_ends_a_process_once_counts_as_nothing(act, tmp_path: Path, way: tuple[str, int]) -> None:
    items = [("once", (str(tmp_path / "marker"), way)), ("square", 3)]
    timeout = 1.0 if way[0] == "hang" else 60.0
    assert dict(run_isolated(act, items, processes=2, timeout_seconds=timeout)) == {0: "second attempt", 1: 9}


@pytest.mark.parametrize("item", [("kill", 9), ("kill", 7), ("av", errno.ENOMEM)], ids=str)
def test_an_item_that_the_machine_ends_twice_stops_the_job_after_all_others(act, item: tuple[str, int]) -> None:
    outcomes: dict[int, object] = {}
    with pytest.raises(
        ItemKilledError, match=r"clip 0: .*\nFinished work is kept: run again, with more memory"
    ) as caught:
        items = [item, *(("square", n) for n in range(4))]
        outcomes.update(run_isolated(act, items, 2, 60, lambda item: f"clip {items.index(item)}"))
    assert outcomes == {1: 0, 2: 1, 3: 4, 4: 9}
    assert ("SIGKILL" in str(caught.value)) == (item == ("kill", 9))


def test_without_a_second_attempt_what_was_killed_is_a_failure(act) -> None:
    items = [("kill", 9), ("kill", int(signal.SIGALRM)), ("square", 3)]
    outcomes = dict(run_isolated(act, items, processes=2, timeout_seconds=60, retry=False))
    assert [outcomes[0].status, outcomes[1].status, outcomes[2]] == [Status.CRASHED, Status.TIMEOUT, 9]


def test_the_second_attempt_has_no_other_worker_beside_it(act, tmp_path: Path) -> None:
    lost = [("once", (str(tmp_path / f"marker-{n}"), ("kill", 9))) for n in range(2)]
    items = [*lost, *(("slow", n) for n in range(4))]
    order = [index for index, _ in run_isolated(act, items, processes=3, timeout_seconds=60)]
    assert order[-2:] == [0, 1], "in order and after all others"


def test_a_worker_that_is_killed_between_two_items_is_replaced(act) -> None:
    outcomes = run_isolated(act, [("pid", n) for n in range(4)], processes=1, timeout_seconds=60)
    killed = []
    for _, pid in outcomes:
        assert isinstance(pid, int)
        killed.append(pid)
        os.kill(pid, signal.SIGKILL)  # it waits for its next item, or has just received it
    assert len(killed) == 4


@pytest.mark.parametrize("number", [errno.EIO, errno.ETIMEDOUT], ids=errno.errorcode.get)
def test_errors_of_the_machine_end_the_job_and_name_the_item(act, number: int) -> None:
    with pytest.raises(OSError, match="while processing clip 7") as caught:
        list(run_isolated(act, [("av", number)], 1, 60, lambda _: "clip 7"))
    assert caught.value.errno == number


def test_processes_that_cannot_start_end_the_job(act, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "sitecustomize.py").write_text("import os; os._exit(4)")
    with pytest.raises(WorkerStartError, match=r"5 worker processes ended before .* exit code 4"):
        list(run_isolated(act, [("square", 2)], processes=2, timeout_seconds=60))


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
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])}
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
def test_workers_end_when_their_parent_is_killed_even_in_the_middle_of_an_item(act, tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        "import acts_for_workers\nfrom stm.jobs.workers import run_isolated\n"
        "for _, pid in run_isolated(acts_for_workers.act, [('pid', 0), ('hang', 0)], 1, 600):\n"
        "    print(pid, flush=True)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])}
    with subprocess.Popen([sys.executable, str(script)], env=environment, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        time.sleep(0.5)
        parent.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        if state == "Z":
            return
        time.sleep(0.1)
    assert not Path(f"/proc/{pid}").exists()
