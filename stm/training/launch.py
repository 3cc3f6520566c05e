"""Starts a pretraining run: in this process, or as several under torchrun."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from threading import Thread
from typing import Any, TextIO

from stm.config import LanguageRun, PretrainRun

SHUTDOWN_SECONDS = 120
"""How long torchrun waits, after SIGTERM, for its processes to save; its own 30 seconds may be less than the steps
between two looks at the signal."""


def run_pretraining(
    run: PretrainRun | LanguageRun,
    shard_indexes: Sequence[Path],
    output: Path,
    seed: int,
    image_indexes: Sequence[Path] = (),
) -> None:
    """Pretrains with `run.processes` processes of this machine; see `stm.training.pretrain`.

    Raises:
        RuntimeError: the processes under torchrun ended with an error; their own messages stand above.
        stm.training.interruption.Interrupted: after SIGTERM or SIGUSR1. The state is saved, the exit code is not 0.
    """
    if run.processes == 1:
        from stm.training import pretrain

        pretrain(run, shard_indexes, output, seed, image_indexes=image_indexes)
        return
    request = {
        "run": run.model_dump(mode="json"),
        "shard_indexes": [str(path) for path in shard_indexes],
        "output": str(output),
        "seed": seed,
        "image_indexes": [str(path) for path in image_indexes],
    }
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={run.processes}"]
    status = supervise([*torchrun, "-m", "stm.training.launch", json.dumps(request)])
    if status:
        raise RuntimeError(f"torchrun ended with status {status}; the processes' messages stand above")


def supervise(command: Sequence[str]) -> int:
    """Runs a command to its end and returns its status; what it says on standard error is said on ours.

    SIGTERM and SIGUSR1 reach it as SIGTERM (torchrun knows nothing of SIGUSR1, and would leave its processes behind).

    Raises:
        Interrupted: such a signal came, and the command did not end well after it.
    """
    from stm.training.interruption import Interrupted, Interruption

    environment = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SHUTDOWN_SECONDS), **os.environ}
    told = False
    with (
        Interruption() as interruption,
        # Through a pipe, because a job's log is our `sys.stderr` and not the descriptor behind it.
        subprocess.Popen(  # noqa: S603
            command, env=environment, stderr=subprocess.PIPE, text=True, errors="replace"
        ) as process,
    ):
        assert process.stderr is not None
        messages = Thread(target=_copy, args=(process.stderr,), daemon=True)
        messages.start()
        try:
            while process.poll() is None:
                if interruption.received and not told:
                    process.terminate()
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


def _copy(messages: TextIO) -> None:
    for line in messages:
        sys.stderr.write(line)
        sys.stderr.flush()


def _worker(request: dict[str, object]) -> None:
    from stm.training import pretrain

    asked: Any = request
    kind = PretrainRun if asked["run"]["method"] == "mae" else LanguageRun
    pretrain(
        kind.model_validate(asked["run"]),
        [Path(path) for path in asked["shard_indexes"]],
        Path(asked["output"]),
        int(asked["seed"]),
        image_indexes=[Path(path) for path in asked["image_indexes"]],
    )


if __name__ == "__main__":
    _worker(json.loads(sys.argv[1]))
