"""What two processes joined by gloo train, each with the whole model (DDP) or with a part of it (FSDP)."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from joined import Values
from made_clips import make_run
from made_language import make_batch
from made_language import make_run as make_language_run
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import normalize

from stm.config import LanguageRun, PretrainRun
from stm.data.loader import Batch
from stm.distributed.process import Process
from stm.methods import build_method
from stm.models.weights import zoo
from stm.training.loop import TrainingPlan, fit

CLIPS, STEPS, TEXT_WIDTH = 8, 4, 7
BROKEN_AT = 3  # the step in which a run dies; its last checkpoint is that of step 2
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
    """Stands for what ends a run without a word."""


def run_of(name: str, bert: str | None = None) -> PretrainRun | LanguageRun:
    if name in LANGUAGE:
        optimisation = {"epochs": 2, "batch_size": CLIPS, "warmup_epochs": 0, "scale_by_batch": False, "learning_rate": 1e-3}  # fmt: skip # noqa: E501
        return make_language_run(name, bert, images=IMAGES, optimisation=optimisation)
    return make_run(**{"optimisation": SETTINGS, **RUNS[name]})


def draw_clips(run: PretrainRun | LanguageRun, step: int, encode: Callable[[list[str]], torch.Tensor] | None) -> Batch:
    """A step's samples of all processes. Those of a run with images are clips and images in turn, images first."""
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


def take(batch: Batch, rows: slice) -> Batch:
    return {name: take(value, rows) if isinstance(value, dict) else value[rows] for name, value in batch.items()}


def train(
    run: PretrainRun | LanguageRun,
    output: Path,
    process: Process,
    parallel: str,
    broken_at: int | None = None,
    seed: int = 3,
) -> Values:
    """Losses and gradient norms of the steps, the weights, and those that `zoo.save` wrote; of the first process alone."""
    torch.manual_seed(seed)
    method = build_method(run, 96 if isinstance(run, LanguageRun) else TEXT_WIDTH)
    passes = run.optimisation.accumulate
    rows = CLIPS // passes // process.count

    def batches(step: int) -> Iterator[Batch]:
        for number in range(step, STEPS):
            if number == broken_at:
                raise Killed
            whole = draw_clips(run, number, getattr(method, "encode_captions", None))
            for part in range(passes):
                first = (part * process.count + process.rank) * rows
                yield take(whole, slice(first, first + rows))

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


def break_off(run: PretrainRun | LanguageRun, output: Path, process: Process, parallel: str) -> None:
    try:
        train(run, output, process, parallel, BROKEN_AT)
    except Killed:
        process.wait()
        return
    raise AssertionError("the run was to die")


def work_on_clips(rank: int, folder: Path) -> Values:
    """Runs without text of one of two processes. `folder / "alone"` holds one that a single process has left unfinished."""
    process = Process(rank, 2, torch.device("cpu"))
    found: Values = {}
    compiled = nn.Module.compile  # by torch's own kernels, so that no compiler of C++ is needed
    nn.Module.compile = lambda self, **more: compiled(self, backend="aot_eager", **more)  # type: ignore[method-assign]
    for name in RUNS:
        found |= train_both(run_of(name), folder, name, process)
    output = folder / "broken"
    break_off(run_of("contrast"), output, process, "fsdp")
    if rank == 0:
        shutil.copytree(output, folder / "left")
    process.wait()
    found |= label("resumed", train(run_of("contrast"), output, process, "fsdp", seed=99))
    return found | label("from one", train(run_of("contrast"), folder / "alone", process, "fsdp", seed=99))


def work_on_texts(rank: int, folder: Path, bert: str) -> Values:
    """Runs with text of one of two processes."""
    process = Process(rank, 2, torch.device("cpu"))
    found: Values = {}
    for name in LANGUAGE:
        found |= train_both(run_of(name, bert), folder, name, process)
    break_off(run_of("stm", bert), folder / "broken", process, "fsdp")
    return found | label("resumed", train(run_of("stm", bert), folder / "broken", process, "fsdp", seed=99))


def train_both(run: PretrainRun | LanguageRun, folder: Path, name: str, process: Process) -> Values:
    found: Values = {}
    for parallel in ("ddp", "fsdp"):
        found |= label(f"{name}/{parallel}", train(run, folder / f"{name}-{parallel}", process, parallel))
    return found


def label(name: str, values: Values) -> Values:
    return {f"{name}/{key}": value for key, value in values.items()}
