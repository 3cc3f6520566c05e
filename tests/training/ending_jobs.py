"""Jobs that end in every way: started as Snakemake starts them, and watched until nothing of them is left.

A program, not a test: `python ending_jobs.py FOLDER CASE...` prints how each case ended. The cases share one start of torch: each
runs in a fork, which leaves by the interpreter's own exit.
"""

import gc
import json
import math
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from demo_config import demo_values
from torch.utils.tensorboard.writer import SummaryWriter  # noqa: F401 (takes seconds to import)
from training_shards import FRAMES, make_run, make_shard

import stm.data.loader
import stm.training.loop
from stm.config import Augmentation, LinearProbe
from stm.data.dataset import ClipDataset
from stm.data.geometry import Geometry
from stm.distributed.process import Process
from stm.evaluation import EvaluationInputs, evaluate
from stm.evaluation.language_clips import encode_clips
from stm.training.pretraining import pretrain

LIMIT_SECONDS = 40.0
STAGE = Path(__file__).parents[2] / "workflow/scripts/stage.py"
RUN: dict[str, Any] = {
    "model": "tiny", "image_size": 32, "patch_size": 16, "frames": 4, "decoder_depth": 1, "workers": 2,
    "mask": {"strategy": "random", "ratio": 0.5}, "checkpoint_every": 2,
}  # fmt: skip
OPTIMISATION: dict[str, Any] = {"epochs": 400, "batch_size": 4, "warmup_epochs": 0}


def run_stage(folder: Path, shard: Path, run: Mapping[str, Any] | None = None) -> None:
    """The pretraining job of a config, by the script that Snakemake calls."""
    training = {"run": {**RUN, "optimisation": OPTIMISATION, **(run or {})}}
    values = demo_values() | {"pretrain": training, "evaluate": {}, "report": {}}
    job = SimpleNamespace(
        rule="pretrain",
        config=values,
        wildcards={"dataset": values["name"], "run": "run"},
        input={"shards": [str(shard)], "images": [], "init": [], "masks": []},
        output={"weights": str(folder / "run/weights.safetensors"), "config": str(folder / "run/config.json")},
        threads=1,
        resources={"gpu": 1},
        log=[str(folder / "log.txt")],
    )
    runpy.run_path(str(STAGE), {"snakemake": job})


def at_step(step: int, act: Callable[[Any], Any]) -> None:
    """Acts on a later training run after one of its steps."""
    write = stm.training.loop._Run.write

    def act_after(self: Any, log: Any) -> None:
        write(self, log)
        if self.step == step:
            act(self)

    stm.training.loop._Run.write = act_after  # type: ignore[method-assign]


def loading_processes() -> list[int]:
    return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]


def damage(shard: Path) -> Path:
    """The shard, with zeros in every frame of its last clip."""
    tar = shard.with_suffix(".tar")
    data = bytearray(tar.read_bytes())
    at = len(data)
    for _ in range(FRAMES):
        at = data.rindex(b"\xff\xd8\xff", 0, at)
        data[at + 20 : at + 400] = bytes(380)
    tar.write_bytes(data)
    return shard


def not_finite(folder: Path, shard: Path) -> None:
    at_step(3, lambda run: next(run.module.parameters()).data.fill_(math.nan))
    run_stage(folder, shard)


def damaged(folder: Path, shard: Path) -> None:
    run_stage(folder, damage(shard))


def loader_killed(folder: Path, shard: Path) -> None:
    at_step(3, lambda _: os.kill(loading_processes()[-1], signal.SIGKILL))
    run_stage(folder, shard)


def not_writable(folder: Path, shard: Path) -> None:
    (folder / "run").mkdir()
    (folder / "run/checkpoints").write_text("a file")
    run_stage(folder, shard)


def interrupted(folder: Path, shard: Path) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    at_step(3, lambda _: os.kill(os.getpid(), signal.SIGINT))
    run_stage(folder, shard)


def left(folder: Path, shard: Path) -> None:
    at_step(3, lambda _: sys.exit(7))
    run_stage(folder, shard)


def killed(folder: Path, shard: Path) -> None:
    at_step(3, lambda _: os.kill(os.getpid(), signal.SIGKILL))
    run_stage(folder, shard)


def not_sendable(folder: Path, shard: Path) -> None:
    collate = stm.data.loader.collate
    stm.data.loader.collate = lambda *items: {**collate(*items), "key": lambda: None}
    run_stage(folder, shard)


def stuck(folder: Path, shard: Path, seconds: float = 1.0) -> None:
    """SIGTERM while loading is stuck in a call that no signal ends, after a few batches."""

    def get(self: ClipDataset, item: Any, real: Any = ClipDataset.__getitem__) -> Any:
        if item[0] == 1:
            (folder / "stuck").touch()
            time.sleep(600)
        return real(self, item)

    ClipDataset.__getitem__ = get  # type: ignore[method-assign]
    parent = os.getpid()
    if os.fork() == 0:
        while not (folder / "stuck").exists():
            time.sleep(0.05)
        time.sleep(seconds)
        os.killpg(parent, signal.SIGTERM)
        os._exit(0)
    run_stage(folder, shard)


def probe(folder: Path, shard: Path) -> None:
    run = make_run(optimisation={"epochs": 0}, workers=2)
    pretrain(run, [shard], folder / "run", 3, "cpu")
    inputs = EvaluationInputs(
        folder / "run/weights.safetensors", [damage(shard)], folder, 3, train=[shard], device="cpu"
    )
    evaluate(LinearProbe(task="linear", epochs=1, batch_size=4, views=1), run, inputs)


def language(folder: Path, shard: Path) -> None:
    data = ClipDataset([damage(shard)], Geometry(32, 16, 2, 4), Augmentation(), 0, False)
    model: Any = SimpleNamespace(encoder=lambda video: video.float().flatten(2)[..., :8])
    encode_clips(model, data, Process(0, 1, torch.device("cpu")), 2)


def large_batches(folder: Path, shard: Path) -> None:
    """Larger than the shared memory that the test gives."""
    run_stage(folder, shard, {"image_size": 64})


CASES = (
    not_finite, damaged, loader_killed, not_writable, interrupted, left, killed, not_sendable, large_batches, stuck, probe,
    language,
)  # fmt: skip


def members(session: int) -> list[int]:
    """The processes of a session that have not ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, own = path.read_text().rpartition(")")[2].split()[:4]
        except OSError:  # it has ended meanwhile
            continue
        if int(own) == session and state not in "ZX":
            found.append(int(path.parent.name))
    return found


def watch(pid: int) -> dict[str, Any]:
    """Waits for a process; returns its status and the processes that it leaves."""
    start = time.monotonic()
    done = status = 0
    while not done and time.monotonic() < start + LIMIT_SECONDS:
        done, status = os.waitpid(pid, os.WNOHANG)
        time.sleep(0.05)
    seconds = time.monotonic() - start
    time.sleep(0.2)
    left_behind = members(pid)
    for process in left_behind:
        os.kill(process, signal.SIGKILL)
    return {
        "status": os.waitstatus_to_exitcode(status) if done else None,
        "left": len(left_behind),
        "seconds": round(seconds, 1),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    gc.freeze()  # an exit would otherwise search what is imported here for garbage, for seconds
    root, ends = Path(sys.argv[1]), {}
    for case in CASES:
        if case.__name__ not in sys.argv[2:]:
            continue
        folder = root / case.__name__
        shard = make_shard(folder / "train/train-00000.parquet", ["red", "green"] * 6)
        pid = os.fork()
        if pid == 0:
            os.setsid()
            messages = os.open(folder / "messages.txt", os.O_CREAT | os.O_WRONLY)
            os.dup2(messages, 1)
            os.dup2(messages, 2)
            case(folder, shard)
            sys.exit(0)
        ends[case.__name__] = watch(pid)
    print(json.dumps(ends))
