"""Several processes under torchrun: signals reach them, their messages and their status come back, who dies is replaced."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import pytest
from ending_jobs import damage
from training_shards import make_run, make_shard

from stm.config import PretrainRun
from stm.storage.files import write_json
from stm.training.launch import _worker, run_pretraining, supervise, torchrun_command

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

sys.exit(supervise(sys.argv[1:]))
"""

PRETRAIN = """
import sys
from pathlib import Path
from stm.config import PretrainRun
from stm.training.launch import run_pretraining

run, output, *shards = sys.argv[1:]
run_pretraining(PretrainRun.model_validate_json(run), [Path(s) for s in shards], Path(output), 7)
"""


def wait_for(process: subprocess.Popen[str], folder: Path, pattern: str, known: Collection[Path] = ()) -> None:
    """Wait for a file that is not among the known ones."""
    deadline = time.monotonic() + 120
    while not set(folder.glob(pattern)).difference(known):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
        time.sleep(0.01)


def check_told(folder: Path, number: signal.Signals, *command: str) -> None:
    """A signal to the process that supervises a command, one like CHILD, reaches it, and the exit code names the signal."""
    called = [sys.executable, "-c", PARENT, *command, str(folder / "ready")]
    parent = subprocess.Popen(called, stderr=subprocess.PIPE, text=True)
    wait_for(parent, folder, "ready")
    parent.send_signal(number)
    _, messages = parent.communicate(timeout=30)
    assert "saving" in messages
    assert parent.returncode == 128 + number, messages


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_reaches_the_command_and_the_exit_code_names_it(tmp_path: Path, number: signal.Signals) -> None:
    check_told(tmp_path, number, sys.executable, "-c", CHILD)


# Stands for torchrun, which leaves its processes behind by a second signal.
ONCE = """
import signal, sys, time
from pathlib import Path

def stop(number, frame):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("left behind"))
    print("Received 15 death signal, shutting down workers", file=sys.stderr, flush=True)
    time.sleep(2.5)
    print("saved", file=sys.stderr)
    raise SystemExit(3)

signal.signal(signal.SIGTERM, stop)
Path(sys.argv[1]).touch()
time.sleep(60)
"""


def test_a_signal_that_the_command_has_got_itself_is_not_sent_again(tmp_path: Path) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, sys.executable, "-c", ONCE, str(tmp_path / "ready")],
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    wait_for(parent, tmp_path, "ready")
    os.killpg(parent.pid, signal.SIGTERM)  # to all processes, as batch systems do
    _, messages = parent.communicate(timeout=60)
    assert "saved" in messages and "left behind" not in messages
    assert parent.returncode == 128 + signal.SIGTERM


# Stands for torchrun, which has ended its processes after an error, and has started them again.
RESTARTED = "import sys\nprint('Sending process 1 closing signal SIGTERM', file=sys.stderr, flush=True)\n" + CHILD


def test_a_signal_reaches_a_command_that_has_restarted_its_processes_before(tmp_path: Path) -> None:
    check_told(tmp_path, signal.SIGTERM, sys.executable, "-c", RESTARTED)


def test_srun_is_told_by_the_signal_that_it_passes_on(tmp_path: Path) -> None:
    """By SIGTERM srun kills its tasks; by SIGUSR1 it tells them."""
    srun = tmp_path / "srun"
    program = CHILD.replace("SIGTERM", "SIGUSR1")
    srun.write_text(f"#!{sys.executable}\n{program}")
    srun.chmod(0o755)
    check_told(tmp_path, signal.SIGTERM, str(srun))


def test_without_a_signal_the_status_and_the_messages_are_the_command_s(capsys: pytest.CaptureFixture[str]) -> None:
    assert supervise([sys.executable, "-c", "import sys; sys.exit('no such thing')"]) == 1
    assert "no such thing" in capsys.readouterr().err
    assert supervise([sys.executable, "-c", "pass"]) == 0


def start(run: PretrainRun, shard: Path, output: Path) -> "subprocess.Popen[str]":
    """`run_pretraining` in a process of its own."""
    arguments = [run.model_dump_json(), str(output), str(shard)]
    return subprocess.Popen([sys.executable, "-c", PRETRAIN, *arguments], stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shard(tmp_path_factory.mktemp("shards") / "train" / "train-00000.parquet", ["red", "green"] * 4)


SETTINGS: dict[str, Any] = {"workers": 1, "parallel": "fsdp", "optimisation": {"epochs": 16}, "checkpoint_every": 2}
RUN = make_run(processes=2, **SETTINGS)


@pytest.fixture(scope="module")
def undisturbed(shard: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The weights of RUN."""
    folder = tmp_path_factory.mktemp("undisturbed")
    process = start(RUN, shard, folder)
    assert process.wait(timeout=300) == 0, process.communicate()[1]
    return (folder / "weights.safetensors").read_bytes()


@pytest.mark.slow
def test_sigterm_saves_a_run_of_two_processes(shard: Path, tmp_path: Path) -> None:
    run = make_run(processes=2, optimisation={"epochs": 300}, checkpoint_every=5)
    process = start(run, shard, tmp_path / "run")
    wait_for(process, tmp_path / "run", "checkpoints/step-*.pt")
    process.send_signal(signal.SIGTERM)
    _, messages = process.communicate(timeout=150)
    assert process.returncode == 128 + signal.SIGTERM, messages
    assert "SIGTERM: saved after step" in messages
    assert not (tmp_path / "run" / "weights.safetensors").exists()


def workers_under(pid: int) -> list[int]:
    """The processes that torchrun has started, which is started by the process `pid`."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [
        int(worker) for agent in children for worker in Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
    ]


def processes_of(output: Path) -> list[int]:
    """All processes of a run, which have its folder in their command lines; torchrun starts them in sessions of their own."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            # Empty for one that has ended and was not waited for.
            if int(path.parent.name) != os.getpid() and str(output).encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


def left_of(output: Path, seconds: float = 15) -> list[int]:
    """The processes that are left of a run when it had so long to end."""
    deadline = time.monotonic() + seconds
    while processes_of(output) and time.monotonic() < deadline:
        time.sleep(0.05)
    return processes_of(output)


@pytest.mark.slow
def test_whichever_process_is_killed_none_outlives_it_and_the_run_ends_in_the_same_bytes(
    shard: Path, undisturbed: bytes, tmp_path: Path
) -> None:
    """Else two runs would train in one folder. The checkpoints stay; a trainer that is killed is started again at once."""
    saved: list[Path] = []
    for who in ("torchrun", "its parent"):
        process = start(RUN, shard, tmp_path / "run")
        wait_for(process, tmp_path / "run", "checkpoints/step-*.pt", saved)
        torchrun = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text())
        assert len(processes_of(tmp_path / "run")) == 2 + 2 + 2  # with the trainers and their loading processes
        os.kill(torchrun if who == "torchrun" else process.pid, signal.SIGKILL)
        assert left_of(tmp_path / "run") == [], who
        assert process.wait() == (1 if who == "torchrun" else -signal.SIGKILL)
        saved = list((tmp_path / "run/checkpoints").glob("step-*.pt"))
    assert not (tmp_path / "run/weights.safetensors").exists()
    last = start(RUN, shard, tmp_path / "run")
    wait_for(last, tmp_path / "run", "checkpoints/step-*.pt", saved)
    os.kill(workers_under(last.pid)[-1], signal.SIGKILL)
    _, messages = last.communicate(timeout=300)
    assert last.returncode == 0, messages
    assert messages.count("resuming from step") == 2  # in the same call: torchrun has started both again
    assert (tmp_path / "run/weights.safetensors").read_bytes() == undisturbed
    assert not (tmp_path / "run/launch.json").exists()


@pytest.mark.slow
def test_sigterm_ends_several_processes_of_which_one_waits_for_a_stuck_loader(shard: Path, tmp_path: Path) -> None:
    run = make_run(processes=2, workers=1, optimisation={"epochs": 300}, checkpoint_every=5)
    process = start(run, shard, tmp_path / "run")
    wait_for(process, tmp_path / "run", "checkpoints/step-*.pt")
    first = workers_under(process.pid)[0]
    (loader,) = Path(f"/proc/{first}/task/{first}/children").read_text().split()
    os.kill(int(loader), signal.SIGSTOP)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    _, messages = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, messages
    assert "SIGTERM: stopped while waiting for data; the same command resumes from step" in messages
    assert left_of(tmp_path / "run") == []


@pytest.mark.slow
def test_an_error_in_one_of_several_processes_ends_all(tmp_path: Path) -> None:
    shard = damage(make_shard(tmp_path / "train/train-00000.parquet", ["red", "green"] * 4))
    process = start(make_run(processes=2, workers=1), shard, tmp_path / "run")
    _, messages = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "clip-007" in messages and "not retried: the error above would recur" in messages
    assert left_of(tmp_path / "run") == []


@pytest.mark.slow
def test_two_nodes_train_as_two_processes_of_one(
    shard: Path, undisturbed: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command that srun would run on each node, run twice on this one."""
    monkeypatch.setenv("SLURM_JOB_ID", str(os.getpid()))
    monkeypatch.delenv("SLURM_JOB_NODELIST", raising=False)
    monkeypatch.setattr("stm.training.launch.supervise", run_everywhere)
    run_pretraining(make_run(nodes=2, **SETTINGS), [shard], tmp_path, 7)
    assert (tmp_path / "weights.safetensors").read_bytes() == undisturbed


def run_everywhere(command: Sequence[str]) -> int:
    """Stands for `supervise` of srun: its command once for each of two nodes."""
    task = command[next(n for n, word in enumerate(command) if word == sys.executable) :]
    agents = [subprocess.Popen(task, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    ends = [(agent.communicate(timeout=300)[1], agent.returncode) for agent in agents]
    assert [code for _, code in ends] == [0, 0], ends
    return 0


def test_several_nodes_are_started_by_srun_and_meet_on_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "123456")
    monkeypatch.delenv("SLURM_JOB_NODELIST", raising=False)
    run = make_run(nodes=4, processes=8, optimisation={"batch_size": 64})
    command = torchrun_command(run, Path("out/launch.json"))
    first = command.index(sys.executable)
    assert command[:first] == [
        "srun", "--nodes=4", "--ntasks=4", "--ntasks-per-node=1", "--cpu-bind=none", "--kill-on-bad-exit=1",
    ]  # fmt: skip
    rest = command[first:]
    assert rest[1:3] == ["-m", "torch.distributed.run"] and rest[-3:] == [
        "-m",
        "stm.training.launch",
        "out/launch.json",
    ]
    expected = {"--nnodes=4", "--nproc-per-node=8", "--rdzv-backend=c10d", "--rdzv-id=123456"}
    assert expected | {f"--rdzv-endpoint={socket.gethostname()}:13456"} <= set(rest) and "--standalone" not in rest


def test_the_first_node_is_the_one_that_slurm_names_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "scontrol").write_text(
        '#!/bin/sh\n[ "$*" = "show hostnames gpu[07-08]" ] && printf "gpu07\\ngpu08\\n"\n'
    )
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "gpu[07-08]")
    assert "--rdzv-endpoint=gpu07:10005" in torchrun_command(make_run(nodes=2), Path("a"))


def test_several_nodes_without_slurm_are_refused_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(ValueError, match=r"nodes = 2: .*not a Slurm job.*profiles/slurm"):
        run_pretraining(make_run(nodes=2), [tmp_path / "a.parquet"], tmp_path, 7)
    assert torchrun_command(make_run(processes=2), Path("a")).count("--standalone") == 1


def test_an_error_of_the_data_is_not_tried_again(tmp_path: Path) -> None:
    request = tmp_path / "launch.json"
    run = make_run(processes=2, optimisation={"epochs": 1})
    values = {"shard_indexes": [], "image_indexes": [], "output": str(tmp_path), "seed": 7}
    write_json(request, {"work": "pretrain", "arguments": {"run": run.model_dump(mode="json"), **values}})
    with pytest.raises(ValueError, match="but 1 were started"):  # torchrun has not started this one
        _worker(request)
    with pytest.raises(SystemExit, match="not retried"):
        _worker(request)


def test_a_finished_process_deletes_the_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun takes seconds to end, and whoever is killed in that time deletes nothing."""
    request = tmp_path / "launch.json"
    values = {"shard_indexes": [], "image_indexes": [], "output": str(tmp_path), "seed": 7}
    values["run"] = make_run(processes=2).model_dump(mode="json")
    write_json(request, {"work": "pretrain", "arguments": values})
    monkeypatch.setattr("stm.training.pretraining.pretrain", lambda *_, **__: None)
    _worker(request)
    assert not request.exists()


def test_a_process_whose_torchrun_has_ended_before_it_began_ends(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "stm.training.launch", str(tmp_path / "launch.json")]
    orphan = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (orphan.returncode, orphan.stderr) == (1, "torchrun has ended\n")


def test_an_error_in_the_processes_is_an_error_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stm.training.launch.supervise", lambda command: 1)
    with pytest.raises(RuntimeError, match=r"status 1; the processes' messages are above"):
        run_pretraining(make_run(processes=2), [tmp_path / "a.parquet"], tmp_path, 7)
