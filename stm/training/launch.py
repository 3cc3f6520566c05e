"""Starts training and evaluations: in this process, or in several under torchrun, on one node or on all nodes of a Slurm job."""

import gc
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from threading import Event, Thread
from typing import Any, Literal, Protocol, TextIO

from stm.config import AnyRun, parse_run
from stm.jobs.lifetime import end_with_parent
from stm.jobs.messages import inherit_messages
from stm.stages.jobs import Job
from stm.stages.journey import OBJECTS_PER_COLLECTION
from stm.storage.files import read_json, write_json
from stm.training.interruption import Interrupted, Interruption, requeue_if_preempted
from stm.training.trackers import TENSORBOARD, check_trackers

_TORCHRUN = "torch.distributed.run"

SHUTDOWN_SECONDS = 120
"""How long torchrun waits, after SIGTERM, for its processes to save. Its default of 30 seconds may be shorter than the
interval between two checks for the signal."""

# How long to wait for the command to log that it has received a signal itself, before forwarding the signal.
_GRACE_SECONDS = 1.0
# Part of the message that torchrun logs when it receives a signal itself. (The "closing signal" message that follows is
# also logged after an error.)
_SIGNAL_RECEIVED = "death signal"

_WORK = {
    "pretrain": "stm.training.launch:pretrain_as_requested",
    "evaluate": "stm.evaluation.launch:evaluate_as_requested",
}
"""The functions that do the work in one of several processes. By name, because evaluations are above training."""

RESTARTS = 3
"""How many times torchrun restarts all processes, from the last checkpoint, after one of them has died."""


class Division(Protocol):
    """How the work is divided: a run's section of the config, or an evaluation's."""

    @property
    def processes(self) -> int:
        """Processes per node."""

    @property
    def nodes(self) -> int:
        """Machines."""


def request_gpus(division: Callable[[Job], Division]) -> dict[str, Callable[[Job], Any]]:
    """The resources that a stage's jobs request for their processes: one GPU each.

    On several nodes, GPUs are requested per node (`gres`). The Slurm executor runs the script on the first node (`mpi`), and the
    script starts one task per node with srun; `tasks_per_gpu` keeps the executor from requesting one task per GPU.
    """

    def on_nodes(find: Callable[[Division], Any]) -> Callable[[Job], Any]:
        return lambda job: find(division(job)) if division(job).nodes > 1 else None

    return {
        "gpu": lambda job: division(job).processes if division(job).nodes == 1 else None,
        "mpi": on_nodes(lambda work: "srun"),
        "nodes": lambda job: division(job).nodes,  # one, too: Slurm would collect the GPUs of one job from several
        "tasks": on_nodes(lambda work: work.nodes),
        "tasks_per_gpu": on_nodes(lambda work: 0),
        "gres": on_nodes(lambda work: f"gpu:{work.processes}"),
    }


def run_pretraining(
    run: AnyRun,
    shard_indexes: Sequence[Path],
    output: Path,
    seed: int,
    image_indexes: Sequence[Path] = (),
    trackers: Sequence[str] = TENSORBOARD,
) -> None:
    """Pretrains with `run.processes` processes on each of `run.nodes` nodes; see `stm.training.pretrain`.

    The weights of a run with `release` are converted instead, in this process.

    Raises:
        ValueError: the run needs several nodes, but this is not a Slurm job; or a tracker is not installed.
        RuntimeError: the processes under torchrun ended with an error; their own messages precede it in the log.
        Interrupted: after SIGTERM or SIGUSR1. The state is saved, the exit code is not 0, and a
            Slurm job that is being preempted is back in the queue.
    """
    if run.release is not None:
        from stm.training.release import convert_release

        convert_release(run, output)
        return
    check_trackers(trackers)
    arguments = {
        "run": run.model_dump(mode="json"),
        "shard_indexes": [str(path) for path in shard_indexes],
        "output": str(output),
        "seed": seed,
        "image_indexes": [str(path) for path in image_indexes],
        "trackers": list(trackers),
    }

    def alone() -> None:
        from stm.training.pretraining import pretrain

        pretrain(run, shard_indexes, output, seed, image_indexes=image_indexes, trackers=trackers)

    launch("pretrain", alone, arguments, run, output)


def pretrain_as_requested(request: Mapping[str, Any]) -> None:
    """Pretrains as one of a run's processes; the request is from `run_pretraining`."""
    from stm.training.pretraining import pretrain

    pretrain(
        parse_run(request["run"]),
        [Path(name) for name in request["shard_indexes"]],
        Path(request["output"]),
        int(request["seed"]),
        image_indexes=[Path(name) for name in request["image_indexes"]],
        trackers=request.get("trackers", TENSORBOARD),
    )


def launch(
    work: Literal["pretrain", "evaluate"],
    alone: Callable[[], None],
    arguments: Mapping[str, Any],
    division: Division,
    folder: Path,
) -> None:
    """Does a job's work in several processes, or in this one.

    Args:
        work: what is done in several processes, see `_WORK`.
        alone: does it in this process.
        arguments: JSON values that describe the work to the processes.
        folder: where a file with the arguments is while the processes run.

    Raises:
        ValueError: several nodes are needed, but this is not a Slurm job.
        RuntimeError: the processes under torchrun ended with an error; their own messages precede it in the log.
        Interrupted: after SIGTERM or SIGUSR1.
    """
    try:
        if division.processes * division.nodes == 1:
            alone()
        else:
            _run_processes(work, arguments, division, folder)
    except (Interrupted, RuntimeError):
        # On several nodes Slurm signals srun's tasks but not the batch script, which only sees them fail: so RuntimeError is
        # handled, too.
        requeue_if_preempted()
        raise


def _run_processes(work: str, arguments: Mapping[str, Any], division: Division, folder: Path) -> None:
    # In a file, because many shard names may exceed the length limit of a command line; other nodes read it, too.
    request = folder / "launch.json"
    command = torchrun_command(division, request)
    write_json(request, {"work": work, "arguments": arguments})
    try:
        status = supervise(command)
    finally:
        request.unlink(missing_ok=True)
    if status:
        raise RuntimeError(f"torchrun ended with status {status}; the processes' messages are above")


def torchrun_command(division: Division, request: Path) -> list[str]:
    """The command that starts the processes: torchrun, or srun with one torchrun per node, which meet on the first node.

    Raises:
        ValueError: several nodes are needed, but this is not a Slurm job.
    """
    torchrun = [sys.executable, "-m", _TORCHRUN, f"--nnodes={division.nodes}"]
    # Slurm's warning signal reaches torchrun as well as its processes; unhandled, it would kill torchrun only.
    torchrun += [f"--nproc-per-node={division.processes}", f"--max-restarts={RESTARTS}"]
    torchrun += ["--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"]
    program = ["-m", "stm.training.launch", str(request)]
    if division.nodes == 1:
        return [*torchrun, "--standalone", *program]
    job = os.environ.get("SLURM_JOB_ID", "")
    if not job.isdecimal():
        raise ValueError(
            f"nodes = {division.nodes}: srun starts the processes of several nodes, and this is not a Slurm job. Use the "
            "profile workflow/profiles/slurm, or call `stm pretrain` or `stm evaluate` in a job of as many nodes (sbatch, salloc)"
        )
    srun = ["srun", f"--nodes={division.nodes}", f"--ntasks={division.nodes}", "--ntasks-per-node=1"]
    # No CPU binding, because each node's single task starts all of the node's processes. --kill-on-bad-exit, because the
    # other nodes would wait for one that has failed.
    srun += ["--cpu-bind=none", "--kill-on-bad-exit=1"]
    # The port is derived from the job id, because two jobs may share a node, and is below the range of ephemeral ports.
    endpoint = f"{_first_host()}:{10000 + int(job) % 20000}"
    meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", f"--rdzv-id={job}"]
    return [*srun, *torchrun, *meeting, *program]


def _first_host() -> str:
    """The job's first node. A batch script runs on it; only a program under salloc may run elsewhere."""
    nodes = os.environ.get("SLURM_JOB_NODELIST")  # Snakemake's executor removes it in batch jobs
    if nodes is None:
        return socket.gethostname()
    names = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)  # noqa: S603, S607
    return names.stdout.split()[0]


def supervise(command: Sequence[str]) -> int:
    """Runs a command until it exits and returns its exit status; copies its standard error to ours.

    SIGTERM and SIGUSR1 are forwarded as SIGTERM, unless the command logs that it has received one itself: batch systems
    signal all processes of a job, and on a second signal torchrun abandons its processes while they are still saving. srun
    gets SIGUSR1 instead, which it forwards to its tasks: on SIGTERM it would kill them. If this process is killed, so is the
    command.

    Raises:
        Interrupted: such a signal was received, and the command then ended with an error.
    """
    # Restarted processes need a separate rendezvous store: in torchrun's, they may read the address of a dead process and
    # wait for it forever.
    fresh = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    environment = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SHUTDOWN_SECONDS), **os.environ, **fresh}
    warning = signal.SIGUSR1 if Path(command[0]).name == "srun" else signal.SIGTERM
    signalled = False
    received = Event()  # whether the command itself has received a signal
    since = 0.0
    with (
        Interruption() as interruption,
        # Through a pipe, because a job's log replaces `sys.stderr`, not the underlying file descriptor.
        subprocess.Popen(  # noqa: S603
            command,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            # Safe beside threads: a single call of the kernel.
            preexec_fn=end_with_parent,
        ) as process,
    ):
        assert process.stderr is not None
        messages = Thread(target=_copy, args=(process.stderr, received), daemon=True)
        messages.start()
        try:
            while process.poll() is None:
                if interruption.received and not signalled:
                    since = since or time.monotonic()
                    signalled = received.is_set()
                    if not signalled and time.monotonic() - since > _GRACE_SECONDS:
                        process.send_signal(warning)
                        signalled = True
                _wait(process)
        except BaseException:  # otherwise the processes would keep running
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


def _copy(messages: TextIO, received: Event) -> None:
    for line in messages:
        if _SIGNAL_RECEIVED in line:
            received.set()
        sys.stderr.write(line)
        sys.stderr.flush()


def _worker(path: Path) -> None:
    """One process of those that the request file at `path` describes.

    An error in the settings or the data would recur, so the process then deletes the request, and torchrun's further
    attempts end at once.
    """
    try:
        request: Any = read_json(path)
    except FileNotFoundError:
        sys.exit("not retried: the error above would recur")
    module, _, name = _WORK[request["work"]].partition(":")
    try:
        getattr(import_module(module), name)(request["arguments"])
    except (ValueError, ArithmeticError):
        path.unlink(missing_ok=True)
        raise
    # Not left to the parent alone: torchrun takes seconds to end, and a job killed in that time is not run again.
    path.unlink(missing_ok=True)


def _main(path: Path) -> None:
    """Runs `_worker`, and ends with it and with torchrun.

    After an error the process skips the interpreter's clean-up, in which communication between GPUs may wait for processes that
    have ended. An orphan of a killed torchrun would keep training beside the processes of the next attempt.
    """
    end_with_parent()
    inherit_messages()
    gc.set_threshold(OBJECTS_PER_COLLECTION)
    parent = Path(f"/proc/{os.getppid()}/cmdline")
    if parent.exists() and _TORCHRUN not in parent.read_text().split("\0"):
        sys.exit("torchrun has ended")
    try:
        _worker(path)
    except BaseException as error:
        code = error.code if isinstance(error, SystemExit) else None
        if not isinstance(code, int):
            traceback.print_exception(error)
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
