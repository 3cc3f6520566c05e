"""The processes of a run, and the collective operations that the training loop needs.

torchrun starts the processes, on one node or several, and sets their rank and world size in the environment.
"""

import inspect
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from stm.jobs.gpus import NO_DEVICES

_log = logging.getLogger(__name__)

# DDP's argument for broadcasting buffers in each forward pass: the second name is the older one, which newer versions of
# torch deprecate with a warning.
_BUFFERS_EACH_PASS = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in inspect.signature(DistributedDataParallel).parameters
)


@dataclass(frozen=True)
class Process:
    """One process of a run: its rank, the number of processes and its device."""

    rank: int
    count: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and logs."""
        return self.rank == 0

    def wrap(self, module: nn.Module) -> nn.Module:
        """Wrap the module so that gradients are averaged over the processes; return it unchanged for a single process."""
        if self.count == 1:
            return module
        devices = [self.device.index] if self.device.type == "cuda" else None
        options: dict[str, Any] = {
            # Buffers need no broadcast: position tables never change, and GlobalBatchNorm keeps running statistics equal on
            # all processes.
            _BUFFERS_EACH_PASS: False,
            # Steps on images do not use the parameters that compare frames.
            "find_unused_parameters": bool(getattr(module, "has_unused_parameters", False)),
        }
        return DistributedDataParallel(module, device_ids=devices, gradient_as_bucket_view=True, **options)

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Return the elementwise mean over the processes; the shape must be the same everywhere."""
        if self.count == 1:
            return values
        total = values.clone()
        torch.distributed.all_reduce(total)
        return total / self.count

    def any(self, flag: bool) -> bool:
        """Whether the flag is true on at least one process; all processes must call it at the same step."""
        if self.count == 1:
            return flag
        maximum = torch.tensor(float(flag), device=self.device)
        torch.distributed.all_reduce(maximum, op=torch.distributed.ReduceOp.MAX)
        return bool(maximum.item())

    def gather(self, row: torch.Tensor) -> list[torch.Tensor]:
        """Return the rows of all processes in rank order, on the CPU; shape and dtype must be equal everywhere."""
        if self.count == 1:
            return [row.cpu()]
        rows = [torch.empty_like(row, device=self.device) for _ in range(self.count)]
        torch.distributed.all_gather(rows, row.to(self.device))
        return [r.cpu() for r in rows]

    def share(self, value: float) -> float:
        """Return the first process's value; all processes must call it together."""
        if self.count == 1:
            return value
        return float(self.gather(torch.tensor([value], dtype=torch.float64))[0].item())

    def wait(self) -> None:
        """Block until all processes have called it."""
        if self.count > 1:
            torch.distributed.barrier()


def choose_device(name: str | None = None) -> torch.device:
    """Return the named device; by default CUDA if available, else the CPU. `cuda` refers to this process's own GPU.

    Raises:
        ValueError: CUDA is asked for, by name or because GPUs are assigned to this process, and there is none; or there are
            fewer GPUs than processes on this machine.
    """
    assigned = os.environ.get("CUDA_VISIBLE_DEVICES", "").strip()
    if not torch.cuda.is_available() and (name == "cuda" or (name is None and assigned not in NO_DEVICES)):
        reason = "the device is `cuda`" if name == "cuda" else f"CUDA_VISIBLE_DEVICES is {assigned!r}"
        raise ValueError(
            f"{reason}, but torch {torch.__version__} finds no usable GPU: `nvidia-smi` and `python -c 'import torch; "
            "torch.zeros(1).cuda()'` say why (the driver, or a torch without CUDA). To run on the CPU, unset the variable"
        )
    kind = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind != "cuda":
        return torch.device(kind)
    index, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if index >= gpus:
        raise ValueError(
            f"process {index + 1} of this machine has no GPU, because torch finds {gpus}, and each process needs its own: lower "
            "`processes`, or offer more (CUDA_VISIBLE_DEVICES)"
        )
    return torch.device("cuda", index)


@contextmanager
def join_processes(expected: int, device: str | None = None, patience: timedelta | None = None) -> Iterator[Process]:
    """Join the process group of the processes that torchrun started; leave it at the end of the block.

    After an error the group is not left, because leaving may wait for processes that have ended: the error is to end this
    process, too.

    Args:
        expected: the number of processes.
        device: see `choose_device`.
        patience: how long a process waits for the others, such as for the first one to compute metrics; by default torch's
            10 minutes (gloo: 30). A process that ends with an error ends the others at once.

    Raises:
        ValueError: torchrun started a different number of processes than `expected`.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    if count != expected:
        raise ValueError(
            f"the config says {expected} processes (processes x nodes), but {count} were started. `stm pretrain`, `stm evaluate` "
            "and the workflow start the right number; by hand, use `torchrun --standalone --nproc-per-node "
            f"{expected}` with a program that calls stm.training.pretrain or stm.evaluation.evaluate"
        )
    chosen = choose_device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if count > 1:
        torch.distributed.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=patience)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", count))
    if here > 1 and chosen.type == "cpu" and rank == 0:
        _log.warning(
            f"{here} processes on a CPU share its cores, each holds the whole model and waits for the others: one process that "
            "uses all cores needs less memory and is usually as fast (`processes: 1`)"
        )
    yield Process(rank, count, chosen)
    if count > 1:
        torch.distributed.destroy_process_group()
