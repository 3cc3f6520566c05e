"""GPUs dealt out to jobs: with a stand-in for nvidia-smi, and real processes that claim them."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from stm.jobs.gpus import GpuError, claim_gpus, list_gpus, share_gpus

FOUR = [f"GPU-{letter}1" for letter in "abcd"]
LISTED = "".join(f"GPU {n}: NVIDIA H200 (UUID: {name})\n" for n, name in enumerate(FOUR))
PARTS = "  MIG 1g.18gb     Device  0: (UUID: MIG-p)\n  MIG 2g.35gb     Device  1: (UUID: MIG-q)\n"
# Claims GPUs, reports which, and holds them until a line comes.
JOB = """
import os, sys
from stm.jobs.gpus import claim_gpus
from stm.jobs.messages import configure_messages
configure_messages()
claim_gpus(int(sys.argv[1]), sys.argv[2])
print(os.environ["CUDA_VISIBLE_DEVICES"], flush=True)
sys.stdin.readline()
"""
# The same, for a moment, with times on the clock that all processes share.
SHORT_JOB = """
import os, sys, time
from stm.jobs.gpus import claim_gpus
claim_gpus(int(sys.argv[1]), sys.argv[2])
start = time.monotonic()
time.sleep(0.3)
print(os.environ["CUDA_VISIBLE_DEVICES"], start, time.monotonic(), flush=True)
"""
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with four GPUs, and its own folder of locks."""
    install(tmp_path, monkeypatch, LISTED)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("STM_GPUS", ",".join(FOUR))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, listed: str, status: int = 0) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{listed}END\nexit {status}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)


@pytest.fixture
def start() -> Iterator[Start]:
    processes = []

    def start_job(count: int, name: str, code: str = JOB) -> "subprocess.Popen[str]":
        command = [sys.executable, "-c", code, str(count), name]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        processes.append(process)
        return process

    yield start_job
    for process in processes:
        process.kill()
        process.communicate()


def line(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, FOUR),
        ("2,3", FOUR[2:]),
        ("3,0", [FOUR[3], FOUR[0]]),
        ("GPU-b1", ["GPU-b1"]),
        ("GPU-b, GPU-c", ["GPU-b1", "GPU-c1"]),  # CUDA accepts the start of a UUID
        ("1,1,7", ["GPU-b1"]),
        ("0,-1,1", ["GPU-a1"]),  # as in CUDA, a name of no GPU hides those that follow
        ("7,0", []),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
    ],
)
def test_the_user_restricts_the_gpus(visible: str | None, expected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert list_gpus() == expected


@pytest.mark.parametrize(
    ("visible", "expected"),
    [(None, [*FOUR, "MIG-p", "MIG-q"]), ("MIG-q,0", ["MIG-q", FOUR[0]]), ("4", ["MIG-p"]), ("MIG-GPU-e1/7/0",) * 2],
)
def test_the_parts_of_a_divided_gpu_are_devices(
    visible: str | None, expected: list[str] | str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, f"{LISTED}GPU 4: NVIDIA H200 (UUID: GPU-e1)\n{PARTS}")
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert list_gpus() == (expected if isinstance(expected, list) else [expected])


def test_torch_counts_the_gpus_that_nvidia_smi_does_not_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(tmp_path, monkeypatch, "", status=9)
    monkeypatch.setattr("stm.jobs.gpus._COUNT", "print(2)")
    monkeypatch.setattr("stm.jobs.gpus._DRIVERS", ())  # a machine without GPUs, on which the program is installed
    assert list_gpus() == [] and capsys.readouterr().err == ""
    monkeypatch.setattr("stm.jobs.gpus._DRIVERS", (str(tmp_path),))
    assert list_gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", " 1, 0,,2")
    assert list_gpus() == ["1", "0"]
    assert "nvidia-smi does not list the GPUs" in capsys.readouterr().err


def test_the_workflow_starts_no_more_jobs_than_there_are_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (share_gpus(None), share_gpus(2), share_gpus(9), share_gpus(0)) == (4, 2, 4, 0)
    assert os.environ["STM_GPUS"].split(",") == FOUR  # any two of the four
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert share_gpus(None) == 2 and os.environ["STM_GPUS"] == "GPU-c1,GPU-d1"


def test_eight_jobs_never_share_one_of_four_gpus(start: Start) -> None:
    jobs = [start(1, f"small/{n}", SHORT_JOB) for n in range(6)] + [start(2, f"large/{n}", SHORT_JOB) for n in range(2)]
    used = []
    for job in jobs:
        printed, errors = job.communicate(timeout=60)
        assert job.returncode == 0, errors
        names, begin, end = printed.split()
        used += [(gpu, float(begin), float(end)) for gpu in names.split(",")]
    assert len(used) == 6 + 4 and {gpu for gpu, *_ in used} <= set(FOUR)
    for gpu in FOUR:
        times = sorted((begin, end) for name, begin, end in used if name == gpu)
        assert all(end <= begin for (_, end), (begin, _) in pairwise(times))


def test_four_jobs_run_side_by_side_and_one_of_four_processes_has_all(start: Start) -> None:
    jobs = [start(1, f"job/{n}") for n in range(4)]
    assert {line(job) for job in jobs} == set(FOUR)
    for job in jobs:
        job.communicate("\n", timeout=60)
    assert line(start(4, "large")).split(",") == FOUR


def test_a_killed_job_frees_its_gpus_and_waiting_jobs_name_it(start: Start) -> None:
    holder = start(4, "pretrain/k400/tube")
    assert len(line(holder).split(",")) == 4
    waiting = start(2, "evaluate/ssv2")
    assert waiting.stderr is not None
    message = waiting.stderr.readline()
    assert "evaluate/ssv2: waiting for 2 of 4 GPUs" in message
    assert f"GPU-a1: process {holder.pid} (pretrain/k400/tube)" in message
    holder.send_signal(signal.SIGKILL)
    assert line(waiting) == "GPU-a1,GPU-b1"


def test_a_large_job_that_waits_holds_nothing(start: Start) -> None:
    first = start(1, "first")
    line(first)
    large = start(4, "large")
    assert large.stderr is not None and "waiting" in large.stderr.readline()
    small = start(3, "small")
    assert line(small) == "GPU-b1,GPU-c1,GPU-d1"
    for job in (first, small):
        job.communicate("\n", timeout=60)
    assert line(large).split(",") == FOUR


def test_more_gpus_than_there_are_is_an_error_and_not_a_wait() -> None:
    begin = time.monotonic()
    with pytest.raises(
        GpuError, match=r"pretrain/large requests 5 GPUs, and this machine offers 4 \(GPU-a1, .*processes"
    ):
        claim_gpus(5, "pretrain/large")
    assert time.monotonic() - begin < 1


@pytest.mark.parametrize("kind", ["file", "link to nowhere", "no lock"])
def test_what_cannot_be_locked_is_named(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / f"stm-gpus-{socket.gethostname()}-{os.getuid()}"
    if kind == "file":
        folder.touch()
    elif kind == "link to nowhere":
        folder.symlink_to(tmp_path / "nowhere")
    else:
        (folder / "GPU-a1").mkdir(parents=True)  # which cannot be opened as a file
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(GpuError, match=f"{re.escape(str(folder))}.*TMPDIR"):
        claim_gpus(1, "pretrain/large")


def test_a_job_without_gpus_sees_none_and_without_a_pool_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    claim_gpus(0, "frames")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    for pool in (None, ""):  # on a cluster, whose scheduler has assigned one; and on a machine without
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
        if pool is None:
            monkeypatch.delenv("STM_GPUS")
        else:
            monkeypatch.setenv("STM_GPUS", pool)
        claim_gpus(2, "pretrain")
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "3"
