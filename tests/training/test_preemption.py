"""What a stand-in for scontrol is asked; a real Slurm's answers are met in tests/slurm."""

import os
from pathlib import Path

import pytest
from training_shards import make_run

from stm.training.interruption import requeue_if_preempted
from stm.training.launch import run_pretraining

JOB = "JobId=7 JobName=a JobState={state} Reason=None Requeue=1 PreemptEligibleTime=2026-01-02T03:04:05 PreemptTime={time} "


def asked(folder: Path) -> list[str]:
    path = folder / "asked.txt"
    return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`slurm(state, time)` makes this process one of a job in that state."""

    def become(state: str, time: str, status: int = 0) -> Path:
        (tmp_path / "job.txt").write_text(JOB.format(state=state, time=time))
        program = tmp_path / "scontrol"
        program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked.txt\ncat {tmp_path}/job.txt\nexit {status}\n')
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        return tmp_path

    return become


def test_a_job_that_is_being_preempted_goes_back_into_the_queue(slurm) -> None:
    folder = slurm("RUNNING", "2026-01-02T04:05:06")
    assert requeue_if_preempted()
    assert asked(folder) == ["show job 7 --oneliner", "requeue 7"]


def test_so_does_one_whose_processes_on_other_nodes_were_told_alone(slurm, tmp_path: Path) -> None:
    """Slurm tells srun's tasks, and not the batch script that waits for them."""
    folder = slurm("RUNNING", "2026-01-02T04:05:06")
    program = folder / "srun"
    program.write_text("#!/bin/sh\nexit 1\n")
    program.chmod(0o755)
    with pytest.raises(RuntimeError, match="torchrun ended with status 1"):
        run_pretraining(make_run(nodes=2), [], tmp_path / "run", 7)
    assert asked(folder) == ["show job 7 --oneliner", "requeue 7"]


# Its time is nearly up; cancelled; preempted without a grace time, so that Slurm has taken it back already.
@pytest.mark.parametrize(
    ("state", "time"), [("RUNNING", "None"), ("CANCELLED", "None"), ("COMPLETING", "2026-01-02T04:05:06")]
)
def test_other_jobs_end(slurm, state: str, time: str) -> None:
    folder = slurm(state, time)
    assert not requeue_if_preempted()
    assert asked(folder) == ["show job 7 --oneliner"]


def test_without_an_answer_a_job_ends(slurm) -> None:
    folder = slurm("RUNNING", "2026-01-02T04:05:06", status=1)
    assert not requeue_if_preempted()
    assert asked(folder) == ["show job 7 --oneliner"]


def test_no_job_asks_nothing(slurm, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = slurm("RUNNING", "2026-01-02T04:05:06")
    monkeypatch.delenv("SLURM_JOB_ID")
    assert not requeue_if_preempted()
    assert asked(folder) == []
