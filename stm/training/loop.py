"""The training loop, for pretraining and fine-tuning alike.

A run is determined by its module, its batches, its settings and its seed. Everything that changes while it
runs is in the checkpoint, so that a run that was killed and resumed ends with the same weights as an
uninterrupted one, bit for bit on a CPU.
"""

import io
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from stm.config import Optimisation
from stm.data.loader import Batch, move_ahead
from stm.data.loading_processes import explain_lost_processes
from stm.distributed.fsdp import (
    average_scalars,
    copy_whole,
    find_blocks,
    load_whole_state,
    make_whole,
    shard,
    spread_whole,
    whole_state,
)
from stm.distributed.process import Process
from stm.jobs.progress import Progress, log_duration
from stm.training.checkpoint import Checkpoints, describe_layout, random_state, restore_random_state
from stm.training.interruption import Interrupted, Interruption
from stm.training.logs import Clock, Meter, MetricsLog
from stm.training.optimizer import Schedule, build_optimizer, current_learning_rate
from stm.training.trackers import TENSORBOARD

_log = logging.getLogger(__name__)

LOG_EVERY = 10
"""Steps between two lines of the log. The loop waits for the device only at these lines."""

_LONG_STEP = 1.0
"""In seconds. With longer steps, the processes agree on whether to stop after every step; with shorter ones, only at every
line of the log, because agreeing waits for the device."""

_PATIENCE_BETWEEN_STEPS = 1.0
_PATIENCE = 10.0
"""In seconds: how long a run that was asked to stop still waits for a batch. Longer where its state cannot be saved without
that batch: in the middle of a step, or if other processes need this one up to the step at which all of them stop."""


@dataclass(frozen=True)
class TrainingPlan:
    """Settings of the loop; the module and the batches are passed separately."""

    name: str  # for messages
    optimisation: Optimisation
    steps_per_epoch: int
    seed: int
    origin: Mapping[str, Any] = field(default_factory=dict)  # everything that the result depends on; see `Checkpoints`
    precision: str = "float32"
    compile: bool = False
    parallel: str = "ddp"  # across several processes: "ddp", or "fsdp" (stm/distributed/fsdp.py)
    # Whether all processes draw the same random numbers, those of one process with the joint batch, and use those of their own
    # rows (stm/distributed/shares.py); otherwise each has noise of its own.
    shared_noise: bool = False
    layer_decay: float = 1.0
    depth: int = 0  # blocks of the encoder; needed with `layer_decay`
    checkpoint_every: int = 200  # steps
    checkpoints_kept: int = 2
    log_every: int = LOG_EVERY  # steps
    trackers: Sequence[str] = TENSORBOARD  # as in the config

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.optimisation.epochs * self.steps_per_epoch


def fit(
    module: nn.Module,
    batches: Callable[[int], Iterator[Batch]],
    plan: TrainingPlan,
    output: Path,
    process: Process,
    after_epoch: Callable[[int], None] | None = None,
) -> Checkpoints:
    """Trains `module` in place, resuming from the newest checkpoint under `output`, if any.

    Args:
        module: on the process's device. `module(batch)` returns scalars by name; `loss` is minimised, and all are
            logged. It may define `observers()`, see `clip_gradient`.
        batches: `batches(step)` returns the forward passes' batches from optimiser step `step` (from 0) to the end of
            the run: `accumulate` of them per step, on the CPU.
        plan: the settings.
        output: folder where `metrics.jsonl`, `checkpoints/`, and what belongs to the trackers are written.
        after_epoch: called with the number of finished epochs, before the checkpoint of that step is written (by several
            processes, before and after); it must not change the random state. A resumed run calls it again for an epoch that
            it repeats, or whose call was interrupted.

    Returns:
        The checkpoints, to be discarded once the final weights have been written.

    Raises:
        Interrupted: after SIGTERM or SIGUSR1; the state is saved, unless a batch in the middle of a step does not arrive.
        FloatingPointError: the loss is no longer finite.
        RuntimeError: a loading process was killed.
        MemoryError: the shared memory through which loading processes pass batches is full.
    """
    run = _Run(module, plan, output, process)
    stream = move_ahead(batches(run.step), process.device)
    run.settle()
    # Only after the checkpoint is loaded: DDP broadcasts the first process's weights when it wraps the module.
    model = module if isinstance(module, FSDPModule) else process.wrap(module)
    optimizer = run.optimizer
    accumulate = plan.optimisation.accumulate
    with (
        # Explicitly closed, which ends the loading processes: an error's traceback would keep them.
        closing(stream),
        explain_lost_processes(),
        MetricsLog(output, run.step, process, plan.trackers, plan.name, plan.origin) as log,
        run.progress() as progress,
        Interruption() as interruption,
    ):
        run.end_epoch(after_epoch, interruption)  # only if this was interrupted
        while run.step < plan.steps:
            run.schedule.step_update(run.step)
            for part in range(1, accumulate + 1):
                with run.waiting(interruption, between_steps=part == 1):
                    batch = next(stream)
                with _gradients_averaged(model, part == accumulate):
                    with _precision(plan.precision, process.device):
                        losses = model(batch)
                    # Outside autocast: the backward pass uses each operation's own precision.
                    (losses["loss"] / accumulate).backward()
                run.meter.add(losses)
            average_scalars(module, process)
            run.meter.add({"gradient_norm": clip_gradient(module, plan.optimisation.clip_grad)})
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            run.step += 1
            run.write(log)
            run.end_epoch(after_epoch, interruption)
            run.keep(interruption)
            progress.advance(plan.optimisation.batch_size, run.note)
    make_whole(module, process)
    return run.checkpoints


def fit_to_test(
    module: nn.Module,
    batches: Callable[[int], Iterator[Batch]],
    plan: TrainingPlan,
    output: Path,
    process: Process,
    after_epoch: Callable[[int], None] | None = None,
) -> Checkpoints:
    """`fit`, for a module that every process runs as a whole after training and in `after_epoch`.

    With FSDP a copy is trained, because a sharded module can only be called as in training; `module` gets its weights.
    """
    if plan.parallel != "fsdp" or process.count == 1:
        return fit(module, batches, plan, output, process, after_epoch)
    trained = deepcopy(module)

    def test(epoch: int) -> None:
        assert after_epoch is not None
        copy_whole(trained, module)
        after_epoch(epoch)

    checkpoints = fit(trained, batches, plan, output, process, None if after_epoch is None else test)
    spread_whole(trained, module, process)
    return checkpoints


class _Run:
    """Everything that changes during training."""

    def __init__(self, module: nn.Module, plan: TrainingPlan, output: Path, process: Process) -> None:
        self.module = module
        self.plan = plan
        self.process = process
        self._prepare()
        self.optimizer = build_optimizer(module, plan.optimisation, layer_decay=plan.layer_decay, depth=plan.depth)
        self.schedule = Schedule(self.optimizer, plan.optimisation, plan.steps_per_epoch)
        self.meter = Meter(process)
        self._clock = Clock()
        self._slow = True  # until the duration of a step is known
        self._epochs_ended = 0  # epochs for which `after_epoch` has returned
        self.note = ""
        layout = describe_layout(module.state_dict(), [len(group["params"]) for group in self.optimizer.param_groups])
        self.checkpoints = Checkpoints(output / "checkpoints", plan.origin, plan.checkpoints_kept, layout)
        newest = self.checkpoints.newest() if process.first else 0
        # The first process decides for all: on a shared disk, others might see a checkpoint that is being written or moved.
        self.step = int(process.gather(torch.tensor([newest]))[0].item())
        self._saved = self.step  # step of the newest checkpoint

    def _prepare(self) -> None:
        sharded = self.plan.parallel == "fsdp" and self.process.count > 1
        if self.plan.compile:
            # FSDP gathers weights between the blocks' graphs, never inside one, so each block is compiled separately.
            for part in find_blocks(self.module) if sharded else [self.module]:
                part.compile(dynamic=False)
        if sharded:
            shard(self.module, self.process, self.plan.precision)

    def settle(self) -> None:
        """Loads the state of the newest checkpoint; a new run only seeds its random numbers."""
        self._clock.read()  # preparation does not count as training time
        if self.step == 0:
            # Independent of how many random numbers initialising the weights consumed.
            torch.manual_seed(self.plan.seed * 1_000_003 + self._stream + 1)
            return
        state = self.checkpoints.load(self.step)
        self._epochs_ended = state["epochs_ended"] if "epochs_ended" in state else state["epoch"]
        load_whole_state(self.module, self.optimizer, state["model"], state["optimizer"])
        self.meter.restore(state["meter"], self.process.device)
        before, now = len(state["random"]["cpu"]), self.process.count
        if before == now or self.plan.shared_noise:
            restore_random_state(state["random"], self.process, self._stream)
        else:
            # The states do not fit a different number of processes: reseed, by step, so as not to repeat earlier noise.
            torch.manual_seed(((self.plan.seed * 1_000_003 + self.step) * 1_000_003 + self._stream + 1) % 2**64)
        if self.process.first:
            other = f", with {now} processes instead of {before}" if before != now else ""
            _log.info(f"{self.plan.name}: resuming from step {self.step} of {self.plan.steps}{other}")
            if changed := ", ".join(self.checkpoints.changed_versions()):
                _log.warning(
                    f"the steps up to here were computed with other versions ({changed}), so the result of {self.plan.name} may "
                    "differ from that of one version alone; its receipt names them (`resumed`)"
                )

    @property
    def _stream(self) -> int:
        """The number of the stream of random numbers that this process draws from."""
        return 0 if self.plan.shared_noise else self.process.rank

    def progress(self) -> Progress:
        """The progress bar, shown by the first process only."""
        batch = self.plan.optimisation.batch_size
        stream = None if self.process.first else io.StringIO()
        progress = Progress(self.plan.name, self.plan.steps * batch, "clips", stream=stream)
        progress.resume(self.step * batch)
        return progress

    @property
    def last(self) -> bool:
        return self.step == self.plan.steps

    def write(self, log: MetricsLog) -> None:
        """Writes a line of the log if one is due; waits for the device only then."""
        self._clock.add(self.plan.optimisation.batch_size)
        if self.step % self.plan.log_every and not self.last:
            return
        means = self.meter.read()
        self._check_finite(not all(math.isfinite(value) for value in means.values()))
        self.note = f"loss {means['loss']:.4f}"
        epoch = self.step / self.plan.steps_per_epoch
        rate = current_learning_rate(self.optimizer)
        speed = self._clock.read()
        # All processes must agree on it, because it determines the steps at which they exchange the request to stop.
        self._slow = self.process.any(self.plan.optimisation.batch_size / speed > _LONG_STEP)
        values = {"epoch": epoch, **means, "learning_rate": rate, "clips_per_second": speed}
        log.write(self.step, values)

    def end_epoch(self, after_epoch: Callable[[int], None] | None, interruption: Interruption) -> None:
        """Calls `after_epoch` if an epoch has ended; a signal ends that, too."""
        epoch = self.step // max(self.plan.steps_per_epoch, 1)
        if self.step == epoch * self.plan.steps_per_epoch and epoch > self._epochs_ended:
            if after_epoch is not None:
                if self.process.count > 1 and self._saved < self.step:
                    # In the middle of it they could not save, as each is at a different place.
                    self._save()
                    self.process.wait()
                with self.waiting(interruption, between_steps=True, what="validating"):
                    after_epoch(epoch)
            self._epochs_ended = epoch

    @contextmanager
    def waiting(
        self, interruption: Interruption, between_steps: bool, what: str = "waiting for data"
    ) -> Iterator[None]:
        """A block that may take long, which a signal ends: the run then stops.

        Args:
            between_steps: whether no part of a step has been done, so that a single process can save its state.
            what: what the run does meanwhile, for the log.
        """
        can_save = between_steps and self.process.count == 1
        try:
            with interruption.waiting(_PATIENCE_BETWEEN_STEPS if can_save else _PATIENCE):
                yield
        except Interrupted:
            if can_save and self.step:
                self._save()
                self._stop(interruption)
            last = self.checkpoints.steps()[-1:] or [0]
            interruption.stop(f"stopped while {what}; the same command resumes from step {last[0]}")

    def keep(self, interruption: Interruption) -> None:
        """Writes a checkpoint if one is due or the run has been asked to stop; stops the run in the latter case."""
        stop = interruption.received is not None
        if self.process.count > 1:
            # Processes must stop at the same step, and agreeing makes them wait for each other: so they do it only when they
            # wait anyway, or when steps are long.
            stop = (self._slow or self.step % self.plan.log_every == 0) and self.process.any(stop)
        if stop or self.last or self.step % self.plan.checkpoint_every == 0:
            self._save()
        if stop:
            self.process.wait()  # a process that exits terminates all others, and the first one may still be writing
            self._stop(interruption)

    def _stop(self, interruption: Interruption) -> None:
        interruption.stop(f"saved after step {self.step}; the same command resumes from there")

    def _save(self) -> None:
        # Before saving: a checkpoint with NaN in its weights would make every later attempt fail.
        self._check_finite(self.process.any(not self.meter.finite()))
        # On all processes: collecting sharded state is a collective operation.
        model, optimizer = whole_state(self.module, self.optimizer)
        state = {
            "samples": self.step * self.plan.optimisation.batch_size,
            "epoch": self.step // self.plan.steps_per_epoch,
            "epochs_ended": self._epochs_ended,
            "model": model,
            "optimizer": optimizer,
            "meter": self.meter.state(),
            "random": random_state(self.process),
        }
        if self.process.first:
            with log_duration(f"{self.plan.name}: checkpoint of step {self.step}"):
                self.checkpoints.save(self.step, state)
        self._saved = self.step

    def _check_finite(self, broken: bool) -> None:
        if broken:
            raise FloatingPointError(
                f"{self.plan.name}: the loss or the gradient was not finite shortly before step {self.step}; "
                "lower optimisation.learning_rate, set optimisation.clip_grad, or use precision float32. "
                f"The checkpoints in {self.checkpoints.folder} are from before"
            )


def clip_gradient(module: nn.Module, max_norm: float | None) -> Tensor:
    """Scales the gradient down to `max_norm`, if given; returns its norm before scaling, a scalar.

    Parameters that the module lists in `observers()` are clipped separately and do not count towards the returned norm: a
    probe must not affect the training that it measures.
    """
    observers = {id(parameter) for parameter in module.observers()} if hasattr(module, "observers") else set()  # type: ignore[operator]
    norm = _clip([p for p in module.parameters() if id(p) not in observers], max_norm)
    if observers:
        _clip([p for p in module.parameters() if id(p) in observers], max_norm)
    return norm


def _clip(parameters: list[nn.Parameter], max_norm: float | None) -> Tensor:
    parameters = [p for p in parameters if p.grad is not None]
    # Sharded gradients are handled separately from the others: torch's foreach kernels reject a mix of both.
    kinds = ([p for p in parameters if isinstance(p, DTensor) is sharded] for sharded in (True, False))
    parts = [part for part in kinds if part] or [[]]
    norms = [_norm(part) for part in parts]
    norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    if max_norm is not None:
        for part in parts:
            nn.utils.clip_grads_with_norm_(part, max_norm, norm)
    return norm


def _norm(parameters: list[nn.Parameter]) -> Tensor:
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _precision(name: str, device: torch.device) -> AbstractContextManager[Any]:
    """The autocast context of a forward pass. bf16 has the range of float32, so it needs no loss scaling."""
    return torch.autocast(device.type, torch.bfloat16) if name == "bf16" else nullcontext()


def _gradients_averaged(model: nn.Module, last: bool) -> AbstractContextManager[Any]:
    """A context that restricts gradient exchange to the last pass of a step: exchanging partial sums would be wasted work."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    if isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    return nullcontext()
