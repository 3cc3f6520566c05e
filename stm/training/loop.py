"""The training loop, for pretraining and fine-tuning alike.

A run is determined by its module, its batches, its settings and its seed. Everything that changes while it
runs is in the checkpoint, so that a run that was killed ends in the same weights, bit for bit on a CPU, as
one that was not.
"""

import io
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from stm.config import Optimisation
from stm.data.loader import Batch, move
from stm.progress import Progress
from stm.training.checkpoint import Checkpoints, random_state, restore_random_state
from stm.training.distributed import Process
from stm.training.interruption import Interruption
from stm.training.logs import Clock, Meter, MetricsLog, say
from stm.training.optimizer import build_optimizer, build_schedule, current_learning_rate

LOG_EVERY = 10
"""Steps between two lines of the log. Only there does the loop wait for the device."""


@dataclass(frozen=True)
class Plan:
    """What the loop has to know beside the module and the batches."""

    name: str  # for people
    optimisation: Optimisation
    steps_per_epoch: int
    seed: int
    origin: Mapping[str, Any] = field(default_factory=dict)  # what is trained on what; see `Checkpoints`
    precision: str = "float32"
    compile: bool = False
    layer_decay: float = 1.0
    depth: int = 0  # of the encoder; needed with `layer_decay`
    checkpoint_every: int = 200  # steps
    checkpoints_kept: int = 2
    log_every: int = LOG_EVERY  # steps

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.optimisation.epochs * self.steps_per_epoch


def fit(
    module: nn.Module,
    batches: Callable[[int], Iterator[Batch]],
    plan: Plan,
    output: Path,
    process: Process,
    after_epoch: Callable[[int], None] | None = None,
) -> Checkpoints:
    """Trains `module` in place, from the newest checkpoint under `output` if there is one.

    Args:
        module: on the process's device. `module(batch)` returns scalars by name; `loss` is minimised, all are
            logged. It may have `observers()`, see `clip_gradient`.
        batches: `batches(step)` gives the forward passes' batches from optimiser step `step` (from 0) on, to
            the end of the run: `accumulate` of them a step, on the CPU.
        plan: the settings.
        output: gets `metrics.jsonl`, `tensorboard/` and `checkpoints/`.
        after_epoch: called with the number of epochs that are done, before the checkpoint of that step is written; it
            must leave the random state as it is. A run that goes on may call it again for an epoch that it repeats.

    Returns:
        The checkpoints, to be discarded once the weights are in place.

    Raises:
        Interrupted: after SIGTERM or SIGUSR1; the state is saved.
        FloatingPointError: the loss is no longer finite.
    """
    run = _Run(module, plan, output, process)
    stream = batches(run.step)
    run.settle()
    model, optimizer, accumulate = process.wrap(module), run.optimizer, plan.optimisation.accumulate
    with (
        MetricsLog(output, run.step, process) as log,
        run.progress() as progress,
        Interruption() as interruption,
    ):
        while run.step < plan.steps:
            run.schedule.step_update(run.step)
            for part in range(1, accumulate + 1):
                batch = move(next(stream), process.device)
                with _gradients_averaged(model, part == accumulate):
                    with _precision(plan.precision, process.device):
                        losses = model(batch)
                    (losses["loss"] / accumulate).backward()
                run.meter.add(losses)
            run.meter.add({"gradient_norm": clip_gradient(module, plan.optimisation.clip_grad)})
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            run.step += 1
            run.write(log)
            if after_epoch is not None and run.step % plan.steps_per_epoch == 0:
                after_epoch(run.step // plan.steps_per_epoch)
            run.keep(interruption)
            progress.advance(plan.optimisation.batch_size, run.note)
    return run.checkpoints


class _Run:
    """All that changes during training."""

    def __init__(self, module: nn.Module, plan: Plan, output: Path, process: Process) -> None:
        self.module, self.plan, self.process = module, plan, process
        self.optimizer = build_optimizer(module, plan.optimisation, layer_decay=plan.layer_decay, depth=plan.depth)
        self.schedule = build_schedule(self.optimizer, plan.optimisation, plan.steps_per_epoch)
        self.meter, self._clock = Meter(process), Clock()
        self.note = ""
        self.checkpoints = Checkpoints(output / "checkpoints", plan.origin, plan.checkpoints_kept)
        newest = self.checkpoints.newest() if process.first else 0
        self.step = int(process.gather(torch.tensor([newest]))[0].item())
        if plan.compile:
            module.compile(dynamic=False)

    def settle(self) -> None:
        """Takes over the state of the checkpoint, or of a run's beginning."""
        self._clock.read()  # the preparation is no training time
        if self.step == 0:
            # Each process has its own noise, which does not depend on what the initial weights took.
            torch.manual_seed(self.plan.seed * 1_000_003 + self.process.rank + 1)
            return
        state = self.checkpoints.load(self.step)
        self.module.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.meter.restore(state["meter"], self.process.device)
        restore_random_state(state["random"], self.process)
        if self.process.first:
            say(f"{self.plan.name}: goes on after step {self.step} of {self.plan.steps}")

    def progress(self) -> Progress:
        """The line for people; of all processes the first shows it."""
        batch = self.plan.optimisation.batch_size
        stream = None if self.process.first else io.StringIO()
        progress = Progress(self.plan.name, self.plan.steps * batch, "clips", stream=stream)
        progress.resume(self.step * batch)
        return progress

    @property
    def last(self) -> bool:
        return self.step == self.plan.steps

    def write(self, log: MetricsLog) -> None:
        """Writes a line of the log when one is due. Waits for the device only then."""
        self._clock.add(self.plan.optimisation.batch_size)
        if self.step % self.plan.log_every and not self.last:
            return
        means = self.meter.read()
        self._check_finite(not all(math.isfinite(value) for value in means.values()))
        self.note = f"loss {means['loss']:.4f}"
        epoch, rate = self.step / self.plan.steps_per_epoch, current_learning_rate(self.optimizer)
        values = {"epoch": epoch, **means, "learning_rate": rate, "clips_per_second": self._clock.read()}
        log.write(self.step, values)

    def keep(self, interruption: Interruption) -> None:
        """Writes a checkpoint when one is due or the run is to stop; stops it then."""
        stop = interruption.received is not None
        if self.process.count > 1:
            # Processes must agree on the step, and asking makes them wait: only where they do anyway.
            stop = self.step % self.plan.log_every == 0 and self.process.any(stop)
        if stop or self.last or self.step % self.plan.checkpoint_every == 0:
            self._save()
        if stop:
            interruption.stop(self.step)

    def _save(self) -> None:
        self._check_finite(self.process.any(not self.meter.finite()))
        state = {
            "samples": self.step * self.plan.optimisation.batch_size,
            "epoch": self.step // self.plan.steps_per_epoch,
            "model": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "meter": self.meter.state(),
            "random": random_state(self.process),
        }
        if self.process.first:
            self.checkpoints.save(self.step, state)

    def _check_finite(self, broken: bool) -> None:
        if broken:
            raise FloatingPointError(
                f"{self.plan.name}: the loss or the gradient was not finite shortly before step {self.step}; "
                "lower optimisation.learning_rate, set optimisation.clip_grad, or use precision float32. "
                f"The checkpoints in {self.checkpoints.folder} are from before"
            )


def clip_gradient(module: nn.Module, largest: float | None) -> Tensor:
    """Scales the gradient down to the norm `largest`, if that is given; returns its norm before, a scalar.

    Parameters that the module names in `observers()` are clipped by themselves and do not count in what is
    returned: whoever only watches must not slow down the others.
    """
    watching = {id(parameter) for parameter in module.observers()} if hasattr(module, "observers") else set()  # type: ignore[operator]
    norm = _clip([p for p in module.parameters() if id(p) not in watching], largest)
    if watching:
        _clip([p for p in module.parameters() if id(p) in watching], largest)
    return norm


def _clip(parameters: list[nn.Parameter], largest: float | None) -> Tensor:
    parameters = [p for p in parameters if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if largest is not None:
        nn.utils.clip_grads_with_norm_(parameters, largest, norm)
    return norm


def _precision(name: str, device: torch.device) -> AbstractContextManager[Any]:
    """bf16 has float32's range, so it needs no loss scaling."""
    return torch.autocast(device.type, torch.bfloat16) if name == "bf16" else nullcontext()


def _gradients_averaged(model: nn.Module, last: bool) -> AbstractContextManager[Any]:
    """Processes exchange gradients in the last pass of a step only."""
    if isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    return nullcontext()
