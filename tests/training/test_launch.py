"""Several processes under torchrun: signals reach them, their messages and their status come back."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from made_clips import make_run, make_shard

from stm.training.launch import run_pretraining, supervise

# Stands for torchrun: says that it is there, then ends with status 3 when it gets a SIGTERM.
CHILD = """
import signal, sys, time
from pathlib import Path

def stop(number, frame):
    print("saving", file=sys.stderr)
    raise SystemExit(3)

signal.signal(signal.SIGTERM, stop)
Path(sys.argv[1]).touch()
time.sleep(60)
"""

PARENT = """
import sys
from stm.training.launch import supervise

sys.exit(supervise([sys.executable, *sys.argv[1:]]))
"""

PRETRAIN = """
import sys
from pathlib import Path
from stm.config import PretrainRun
from stm.training.launch import run_pretraining

run, output, *shards = sys.argv[1:]
run_pretraining(PretrainRun.model_validate_json(run), [Path(s) for s in shards], Path(output), 7)
"""


def wait_for(process: subprocess.Popen[str], folder: Path, pattern: str) -> None:
    deadline = time.monotonic() + 120
    while not list(folder.glob(pattern)):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_reaches_the_command_and_the_exit_code_names_it(tmp_path: Path, number: signal.Signals) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, "-c", CHILD, str(tmp_path / "ready")], stderr=subprocess.PIPE, text=True
    )
    wait_for(parent, tmp_path, "ready")
    parent.send_signal(number)
    _, messages = parent.communicate(timeout=30)
    assert "saving" in messages
    assert parent.returncode == 128 + number, messages


def test_without_a_signal_the_status_and_the_messages_are_the_command_s(capsys: pytest.CaptureFixture[str]) -> None:
    assert supervise([sys.executable, "-c", "import sys; sys.exit('no such thing')"]) == 1
    assert "no such thing" in capsys.readouterr().err
    assert supervise([sys.executable, "-c", "pass"]) == 0


@pytest.mark.slow
def test_sigterm_saves_a_run_of_two_processes(tmp_path: Path) -> None:
    shard = make_shard(tmp_path / "train" / "train-00000.parquet", ["red", "green"] * 4)
    run = make_run(processes=2, optimisation={"epochs": 300}, checkpoint_every=5)
    arguments = [run.model_dump_json(), str(tmp_path / "run"), str(shard)]
    process = subprocess.Popen([sys.executable, "-c", PRETRAIN, *arguments], stderr=subprocess.PIPE, text=True)
    wait_for(process, tmp_path / "run", "checkpoints/step-*.pt")
    process.send_signal(signal.SIGTERM)
    _, messages = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, messages
    assert "SIGTERM: saved after step" in messages
    assert not (tmp_path / "run" / "weights.safetensors").exists()


def test_an_error_in_the_processes_is_an_error_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stm.training.launch.supervise", lambda command: 1)
    with pytest.raises(RuntimeError, match=r"status 1; the processes' messages stand above"):
        run_pretraining(make_run(processes=2), [tmp_path / "a.parquet"], tmp_path, 7)
