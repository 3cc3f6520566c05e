"""Starts a pretraining run: in this process, or as several under torchrun."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from stm.config import PretrainRun


def run_pretraining(run: PretrainRun, shard_indexes: Sequence[Path], output: Path, seed: int) -> None:
    """Pretrains with `run.processes` processes of this machine; see `stm.training.pretrain`.

    Raises:
        RuntimeError: the processes under torchrun ended with an error; their own messages stand above.
    """
    if run.processes == 1:
        from stm.training import pretrain

        pretrain(run, shard_indexes, output, seed)
        return
    request = {
        "run": run.model_dump(mode="json"),
        "shard_indexes": [str(path) for path in shard_indexes],
        "output": str(output),
        "seed": seed,
    }
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={run.processes}",
    ]
    finished = subprocess.run([*command, "-m", "stm.training.launch", json.dumps(request)], check=False)  # noqa: S603
    if finished.returncode:
        raise RuntimeError(f"torchrun ended with status {finished.returncode}; the processes' messages stand above")


def _worker(request: dict[str, object]) -> None:
    from stm.training import pretrain

    pretrain(
        PretrainRun.model_validate(request["run"]),
        [Path(path) for path in request["shard_indexes"]],  # type: ignore[attr-defined]
        Path(str(request["output"])),
        int(str(request["seed"])),
    )


if __name__ == "__main__":
    _worker(json.loads(sys.argv[1]))
