"""Starts a pretraining run: in this process, or as several under torchrun, on one node or on the nodes of a Slurm job."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from threading import Event, Thread
from typing import Any, TextIO

from stm.config import AnyRun, Run, parse_run
from stm.storage.files import read_json, write_json

SHUTDOWN_SECONDS = 120
"""How long torchrun waits, after SIGTERM, for its processes to save; its own 30 seconds may be less than the steps
between two looks at the signal."""

_GRACE_SECONDS = 1.0
# What torchrun says when it has got a signal itself. ("closing signal", by which it goes on, it also says after an error.)
_HAS_GOT = "death signal"

RESTARTS = 3
"""How often torchrun starts all processes again, from the last checkpoint, when one of them has died."""


def run_pretraining(
    run: AnyRun,
    shard_indexes: Sequence[Path],
    output: Path,
    seed: int,
    image_indexes: Sequence[Path] = (),
) -> None:
    """Pretrains with `run.processes` processes on each of `run.nodes` nodes; see `stm.training.pretrain`.

    Raises:
        ValueError: the run wants several nodes, and this is no Slurm job.
        RuntimeError: the processes under torchrun ended with an error; their own messages stand above.
        stm.training.interruption.Interrupted: after SIGTERM or SIGUSR1. The state is saved, the exit code is not 0, and a
            Slurm job that is being preempted is back in the queue.
    """
    from stm.training.interruption import Interrupted, requeue_if_preempted

    try:
        _run(run, shard_indexes, output, seed, image_indexes)
    except (Interrupted, RuntimeError):
        # Of a job on several nodes srun's tasks are told, and not the batch script: their end is then all that it hears.
        requeue_if_preempted()
        raise


def _run(
    run: AnyRun,
    shard_indexes: Sequence[Path],
    output: Path,
    seed: int,
    image_indexes: Sequence[Path],
) -> None:
    if run.world_size == 1:
        from stm.training.pretraining import pretrain

        pretrain(run, shard_indexes, output, seed, image_indexes=image_indexes)
        return
    # A file, because the names of many shards are longer than a command may be, and other nodes read it too.
    request = output / "launch.json"
    command = torchrun_command(run, request)
    write_json(
        request,
        {
            "run": run.model_dump(mode="json"),
            "shard_indexes": [str(path) for path in shard_indexes],
            "output": str(output),
            "seed": seed,
            "image_indexes": [str(path) for path in image_indexes],
        },
    )
    try:
        status = supervise(command)
    finally:
        request.unlink(missing_ok=True)
    if status:
        raise RuntimeError(f"torchrun ended with status {status}; the processes' messages stand above")


def torchrun_command(run: Run, request: Path) -> list[str]:
    """What starts the run's processes: torchrun, or several of them by srun, one on each node, that meet on this one.

    Raises:
        ValueError: the run wants several nodes, and this is no Slurm job.
    """
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={run.nodes}"]
    # Slurm's warning reaches torchrun as well as its processes; unhandled, it would kill torchrun alone.
    torchrun += [f"--nproc-per-node={run.processes}", f"--max-restarts={RESTARTS}"]
    torchrun += ["--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"]
    program = ["-m", "stm.training.launch", str(request)]
    if run.nodes == 1:
        return [*torchrun, "--standalone", *program]
    job = os.environ.get("SLURM_JOB_ID", "")
    if not job.isdecimal():
        raise ValueError(
            f"nodes = {run.nodes}: the processes of several nodes are started by srun, and this is no Slurm job. Use the "
            "profile workflow/profiles/slurm, or call `stm pretrain` in a job of as many nodes (sbatch, salloc)"
        )
    srun = ["srun", f"--nodes={run.nodes}", f"--ntasks={run.nodes}", "--ntasks-per-node=1"]
    # Unbound: the one task of a node starts all its processes. When one node fails, the others would wait for it.
    srun += ["--cpu-bind=none", "--kill-on-bad-exit=1"]
    # A port of the job's own, below those that systems give out themselves: two jobs may share a node.
    endpoint = f"{_first_host()}:{10000 + int(job) % 20000}"
    meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", f"--rdzv-id={job}"]
    return [*srun, *torchrun, *meeting, *program]


def _first_host() -> str:
    """The job's first node. A batch job runs on it; only a program under salloc may be elsewhere."""
    nodes = os.environ.get("SLURM_JOB_NODELIST")  # Snakemake's executor takes it away, in batch jobs
    if nodes is None:
        return socket.gethostname()
    names = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)  # noqa: S603, S607
    return names.stdout.split()[0]


def supervise(command: Sequence[str]) -> int:
    """Runs a command to its end and returns its status; what it says on standard error is said on ours.

    SIGTERM and SIGUSR1 reach it as SIGTERM, unless it says that it has got one: batch systems signal all processes of a
    job, and by a second signal torchrun leaves its processes behind while they still save. They reach srun as SIGUSR1, which it
    passes on: by SIGTERM it kills what it has started.

    Raises:
        Interrupted: such a signal came, and the command did not end well after it.
    """
    from stm.training.interruption import Interrupted, Interruption

    # Processes that are started again must meet in a store of their own: in torchrun's they may read the address that a
    # dead one has left there, and wait for it for ever.
    fresh = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    environment = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SHUTDOWN_SECONDS), **os.environ, **fresh}
    warning = signal.SIGUSR1 if Path(command[0]).name == "srun" else signal.SIGTERM
    told, has_got, since = False, Event(), 0.0
    with (
        Interruption() as interruption,
        # Through a pipe, because a job's log is our `sys.stderr` and not the descriptor behind it.
        subprocess.Popen(  # noqa: S603
            command, env=environment, stderr=subprocess.PIPE, text=True, errors="replace"
        ) as process,
    ):
        assert process.stderr is not None
        messages = Thread(target=_copy, args=(process.stderr, has_got), daemon=True)
        messages.start()
        try:
            while process.poll() is None:
                if interruption.received and not told:
                    since = since or time.monotonic()
                    told = has_got.is_set()
                    if not told and time.monotonic() - since > _GRACE_SECONDS:
                        process.send_signal(warning)
                        told = True
                _wait(process)
        except BaseException:  # ours is the only hand that can stop the processes
            process.terminate()
            process.wait()
            raise
        messages.join()
    if process.returncode and interruption.received:
        raise Interrupted(128 + interruption.received)
    return process.returncode


def _wait(process: subprocess.Popen[str], seconds: float = 0.2) -> None:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return


def _copy(messages: TextIO, has_got: Event) -> None:
    for line in messages:
        if _HAS_GOT in line:
            has_got.set()
        sys.stderr.write(line)
        sys.stderr.flush()


def _worker(path: Path) -> None:
    """One process of the run that the request at `path` describes.

    An error of the settings or of the data would come again: it takes the request away, and torchrun's further attempts
    end at once.
    """
    try:
        asked: Any = read_json(path)
    except FileNotFoundError:
        sys.exit("not tried again: the error above would come again")
    from stm.training.pretraining import pretrain

    try:
        pretrain(
            parse_run(asked["run"]),
            [Path(name) for name in asked["shard_indexes"]],
            Path(asked["output"]),
            int(asked["seed"]),
            image_indexes=[Path(name) for name in asked["image_indexes"]],
        )
    except (ValueError, ArithmeticError):
        path.unlink(missing_ok=True)
        raise


if __name__ == "__main__":
    _worker(Path(sys.argv[1]))
