"""Journals: what killed processes leave behind, and one job at a time."""

import gc
import os
import pickle
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from stm.jobs.journal import Journal
from stm.jobs.lock import JobRunningError, only_job

ROOT = Path(__file__).parents[2]
RECEIPT = {"stage": "frames"}


def start(code: str, output: Path) -> subprocess.Popen[str]:
    """A process that has opened the journal of `output` as `journal`."""
    script = f"""
import os, sys, time
from pathlib import Path
from stm.jobs.journal import Journal
journal = Journal(Path(sys.argv[1]), {RECEIPT!r})
{code}
"""
    return subprocess.Popen(
        [sys.executable, "-c", script, str(output)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def parts(journal: Journal) -> list[Path]:
    return sorted(path for path in journal.folder.iterdir() if path.name != "lock")


def test_a_file_that_ends_anywhere_yields_the_complete_records(tmp_path: Path) -> None:
    items = {"a": b"first", "é/ü": b"", "c": bytes(range(256)), "d": b"item" * 20}
    journal = Journal(tmp_path / "out", RECEIPT)
    ends = []
    for name, data in items.items():
        journal.put(name, data)
        ends.append(parts(journal)[0].stat().st_size)
    [path] = parts(journal)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        again = Journal(tmp_path / "out", RECEIPT)
        complete = sum(end <= length for end in ends)
        assert [again.get(name) for name in items] == [*items.values()][:complete] + [None] * (len(items) - complete)
    path.write_bytes(whole[:-1])
    again = Journal(tmp_path / "out", RECEIPT)
    again.put("d", b"new")
    assert Journal(tmp_path / "out", RECEIPT).get("d") == b"new"


def test_a_damaged_record_is_processed_again_and_others_are_not(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "out", RECEIPT)
    for name in "abc":
        journal.put(name, name.encode() * 1000)
    [path] = parts(journal)
    data = bytearray(path.read_bytes())
    data[data.index(b"b" * 1000) + 500] ^= 1
    path.write_bytes(data)
    again = Journal(tmp_path / "out", RECEIPT)
    assert [again.get(name) is None for name in "abc"] == [False, True, False]
    again.put("b", b"new")
    assert again.get("b") == b"new"
    assert Journal(tmp_path / "out", RECEIPT).get("b") == b"new"


def test_a_process_killed_in_the_middle_of_a_record_loses_only_that_one(tmp_path: Path) -> None:
    size = 50_000_000
    code = f"journal.put('small', b'x'); print('go', flush=True); journal.put('large', b'y' * {size})"
    for _ in range(5):
        with start(code, tmp_path / "out") as process:
            assert process.stdout is not None and process.stdout.readline() == "go\n"
            while sum(path.stat().st_size for path in parts_of(tmp_path)) < 100_000 and process.poll() is None:
                pass
            process.send_signal(signal.SIGKILL)
        journal = Journal(tmp_path / "out", RECEIPT)
        assert journal.get("small") == b"x"
        assert journal.get("large") in (None, b"y" * size)
        journal.close()
    assert not list(tmp_path.iterdir())


def parts_of(folder: Path) -> list[Path]:
    return [path for path in folder.glob(".out.journal/*") if path.name != "lock"]


def test_workers_store_items_of_any_number_in_one_file_per_process(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "out", RECEIPT)
    sent = pickle.dumps(journal)
    code = f"import pickle\nfor n in range(1000):\n    pickle.loads({sent!r}).put(f'{{n}}-' + sys.argv[1], b'x')"
    for name in ("one", "two"):
        script = f"import sys\n{code}"
        subprocess.run(
            [sys.executable, "-c", script, name], env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True, timeout=60
        )
    assert journal.get("7-one") is None
    journal.refresh()
    assert journal.get("7-one") == journal.get("999-two") == b"x"
    assert len(parts(journal)) == 2


def test_a_worker_that_outlives_its_job_does_not_write_for_one_with_other_settings(tmp_path: Path) -> None:
    sent = pickle.dumps(Journal(tmp_path / "out", RECEIPT))
    gc.collect()
    other = Journal(tmp_path / "out", {"stage": "frames", "every": 2})
    pickle.loads(sent).put("a", b"of the first settings")
    other.refresh()
    assert other.get("a") is None


def test_a_setting_changed_and_changed_back_loses_no_work_and_the_finished_output_leaves_none(tmp_path: Path) -> None:
    receipts = [{"every": number} for number in (1, 2, 3)]
    for _ in range(2):
        for receipt in receipts:
            journal = Journal(tmp_path / "out", receipt)
            found = journal.get("a")
            assert found in (None, str(receipt).encode())
            if found is None:
                journal.put("a", str(receipt).encode())
            del journal
            gc.collect()
    journal = Journal(tmp_path / "out", receipts[0])
    assert len(parts(journal)) == len(receipts), "each item was made once"
    journal.close()
    assert not list(tmp_path.iterdir())


def test_a_second_job_on_the_same_output_ends_and_names_the_first(tmp_path: Path) -> None:
    with start("print('go', flush=True); time.sleep(600)", tmp_path / "out") as first:
        assert first.stdout is not None and first.stdout.readline() == "go\n"
        with pytest.raises(JobRunningError, match=f"out: process {first.pid} on {socket.gethostname()} is writing it"):
            Journal(tmp_path / "out", RECEIPT)
        first.send_signal(signal.SIGSTOP)  # alive although it does nothing
        with pytest.raises(JobRunningError):
            Journal(tmp_path / "out", {"other": "settings"})
        first.send_signal(signal.SIGKILL)
    Journal(tmp_path / "out", RECEIPT).close()  # a dead process holds no lock
    assert not list(tmp_path.iterdir())


def test_a_stage_without_a_journal_holds_a_lock_while_it_writes(tmp_path: Path) -> None:
    with only_job(tmp_path / "out"):
        code = f"from stm.jobs.lock import only_job\nwith only_job(Path({str(tmp_path)!r}) / 'out'): pass"
        with start(code, tmp_path / "other") as other:
            assert other.stderr is not None
            assert f"process {os.getpid()} on {socket.gethostname()} is writing it" in other.stderr.read()
    with start(code, tmp_path / "other") as other:
        assert other.wait() == 0
    assert not list(tmp_path.glob(".out*"))


def test_a_job_can_be_repeated_in_its_process_and_leaves_the_lock_to_others(tmp_path: Path) -> None:
    failed = Journal(tmp_path / "out", RECEIPT)
    again = Journal(tmp_path / "out", RECEIPT)
    del failed
    gc.collect()
    with start("", tmp_path / "out") as other:
        assert other.wait() == 1
    del again
    gc.collect()
    with start("", tmp_path / "out") as other:
        assert other.wait() == 0


def test_without_locks_the_job_runs_and_warns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with pytest.warns(UserWarning, match="this file system has no locks"):
        journal = Journal(tmp_path / "out", RECEIPT)
    journal.put("a", b"x")
    assert journal.get("a") == b"x"
    journal.close()
    assert not list(tmp_path.iterdir())
