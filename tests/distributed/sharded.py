"""Training runs on two processes joined by gloo, each with the whole model (DDP) or a shard of it (FSDP)."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from language_runs import make_batch
from language_runs import make_run as make_language_run
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import normalize
from training_shards import make_run
from two_processes import Values

from stm.config import LanguageRun, PretrainRun
from stm.data.loader import Batch
from stm.distributed.process import Process
from stm.methods import build_method
from stm.models.weights import zoo
from stm.training.loop import TrainingPlan, fit

CLIPS = 8
STEPS = 4
TEXT_WIDTH = 7
KILLED_AT = 3  # the step in which a run is killed; its last checkpoint is from step 2
SETTINGS = {"epochs": 2, "batch_size": CLIPS, "warmup_epochs": 0, "learning_rate": 0.01, "clip_grad": 0.5}
CONTRAST = {"hidden": 16, "layers": 2, "learnable": True}

RUNS: dict[str, dict[str, Any]] = {
    "mae": {},
    "contrast": {"contrast": CONTRAST},
    "contrast only": {"contrast": CONTRAST, "reconstruction": {"weight": 0}},
    "accumulated": {"optimisation": {**SETTINGS, "accumulate": 2}},
    "bf16": {"contrast": CONTRAST, "precision": "bf16"},
    "compiled": {"compile": True},
}
LANGUAGE = ("umt", "stm", "clusterstm")
IMAGES = {"datasets": ["stills"], "batch_size": CLIPS, "mask": {"strategy": "attention", "ratio": 0.5}}


class Killed(Exception):
    """Simulates a kill of the run."""


def run_of(name: str, bert: str | None = None) -> PretrainRun | LanguageRun:
    if name in LANGUAGE:
        optimisation = {"epochs": 2, "batch_size": CLIPS, "warmup_epochs": 0, "scale_by_batch": False, "learning_rate": 1e-3}  # fmt: skip # noqa: E501
        return make_language_run(name, bert, images=IMAGES, optimisation=optimisation)
    return make_run(**{"optimisation": SETTINGS, **RUNS[name]})


def make_samples(
    run: PretrainRun | LanguageRun, step: int, encode: Callable[[list[str]], torch.Tensor] | None
) -> Batch:
    """Return the joint batch of a step. Runs with images alternate between images and clips, starting with images."""
    if isinstance(run, LanguageRun):
        batch = make_batch(CLIPS, frames=4 if step % 2 else 1, seed=step)
        assert encode is not None
        return {**batch, "tokens": encode(batch.pop("caption"))}
    generator = torch.Generator().manual_seed(step)
    return {
        "video": torch.randint(0, 256, (CLIPS, 4, 3, 32, 32), dtype=torch.uint8, generator=generator),
        "guides": {name: torch.rand(CLIPS, 2, 4, generator=generator) for name in ("noise", "similarity")},
        "text": normalize(torch.randn(CLIPS, TEXT_WIDTH, generator=generator), dim=1),
        "caption_index": torch.tensor([0, -1, 1, 0, 0, 1, -1, 0]),
    }


def select_rows(batch: Batch, rows: slice) -> Batch:
    return {name: select_rows(value, rows) if isinstance(value, dict) else value[rows] for name, value in batch.items()}


def train(
    run: PretrainRun | LanguageRun,
    output: Path,
    process: Process,
    parallel: str,
    killed_at: int | None = None,
    seed: int = 3,
) -> Values:
    """Train and return losses and gradient norms per step and the final weights; empty on all but the first process.

    The first process also writes weights.safetensors.
    """
    torch.manual_seed(seed)
    method = build_method(run, 96 if isinstance(run, LanguageRun) else TEXT_WIDTH)
    passes = run.optimisation.accumulate
    rows = CLIPS // passes // process.count

    def batches(step: int) -> Iterator[Batch]:
        for number in range(step, STEPS):
            if number == killed_at:
                raise Killed
            batch = make_samples(run, number, getattr(method, "encode_captions", None))
            for part in range(passes):
                first = (part * process.count + process.rank) * rows
                yield select_rows(batch, slice(first, first + rows))

    plan = TrainingPlan("made", run.optimisation, STEPS // 2, 3, precision=run.precision, parallel=parallel,
                compile=run.compile, checkpoint_every=2, log_every=1)  # fmt: skip
    fit(method.train(), batches, plan, output, process)
    if not process.first:
        return {}
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    zoo.save(method.student, output / "weights.safetensors")
    weights = {f"weights/{name}": tensor for name, tensor in method.state_dict().items()}
    assert not any(isinstance(tensor, DTensor) for tensor in weights.values())
    return {"loss": [x["loss"] for x in lines], "norm": [x["gradient_norm"] for x in lines], **weights}


def train_until_killed(run: PretrainRun | LanguageRun, output: Path, process: Process, parallel: str) -> None:
    try:
        train(run, output, process, parallel, KILLED_AT)
    except Killed:
        process.wait()
        return
    raise AssertionError("the run was not killed")


def train_without_text(rank: int, folder: Path) -> Values:
    """Train all runs without text as one of two processes. `folder / "alone"` has an unfinished run of a single process."""
    process = Process(rank, 2, torch.device("cpu"))
    values: Values = {}
    original = nn.Module.compile
    # This backend uses torch's own kernels, so that no C++ compiler is needed.
    nn.Module.compile = lambda self, **options: original(self, backend="aot_eager", **options)  # type: ignore[method-assign]
    for name in RUNS:
        values |= train_both(run_of(name), folder, name, process)
    output = folder / "killed"
    train_until_killed(run_of("contrast"), output, process, "fsdp")
    if rank == 0:
        shutil.copytree(output, folder / "unfinished")
    process.wait()
    values |= label("resumed", train(run_of("contrast"), output, process, "fsdp", seed=99))
    return values | label("from one", train(run_of("contrast"), folder / "alone", process, "fsdp", seed=99))


def train_with_text(rank: int, folder: Path, bert: str) -> Values:
    """Train all runs with text as one of two processes."""
    process = Process(rank, 2, torch.device("cpu"))
    values: Values = {}
    for name in LANGUAGE:
        values |= train_both(run_of(name, bert), folder, name, process)
    train_until_killed(run_of("stm", bert), folder / "killed", process, "fsdp")
    return values | label("resumed", train(run_of("stm", bert), folder / "killed", process, "fsdp", seed=99))


def train_both(run: PretrainRun | LanguageRun, folder: Path, name: str, process: Process) -> Values:
    """Train a run with DDP and with FSDP."""
    values: Values = {}
    for parallel in ("ddp", "fsdp"):
        values |= label(f"{name}/{parallel}", train(run, folder / f"{name}-{parallel}", process, parallel))
    return values


def label(name: str, values: Values) -> Values:
    """Prefix all keys with a name."""
    return {f"{name}/{key}": value for key, value in values.items()}
