"""One process or several: what the loop needs to know of the others.

Several processes are started by torchrun, on one node or on several, which says rank and number in the environment.
"""

import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from torch import nn
from torch.nn.parallel import DistributedDataParallel

# The name of DDP's argument for sending buffers in each forward pass: the second is the older one,
# and newer versions of torch warn of it.
_BUFFERS_EACH_PASS = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in inspect.signature(DistributedDataParallel).parameters
)


@dataclass(frozen=True)
class Process:
    """This process among those of the run."""

    rank: int
    count: int
    device: torch.device

    @property
    def first(self) -> bool:
        """The one that writes."""
        return self.rank == 0

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module with its gradients averaged over the processes; itself when there is one."""
        if self.count == 1:
            return module
        devices = [self.device.index] if self.device.type == "cuda" else None
        # Buffers are position tables, which never change, and running statistics, which GlobalBatchNorm makes the
        # same on all processes: sending them in each pass would be for nothing.
        more: dict[str, Any] = {_BUFFERS_EACH_PASS: False}
        # A step of images leaves out what compares frames.
        more["find_unused_parameters"] = bool(getattr(module, "takes_turns", False))
        return DistributedDataParallel(module, device_ids=devices, gradient_as_bucket_view=True, **more)

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The mean over the processes."""
        if self.count == 1:
            return values
        total = values.clone()
        torch.distributed.all_reduce(total)
        return total / self.count

    def any(self, flag: bool) -> bool:
        """Whether one process at least says yes; all must ask at the same step."""
        if self.count == 1:
            return flag
        answer = torch.tensor(float(flag), device=self.device)
        torch.distributed.all_reduce(answer, op=torch.distributed.ReduceOp.MAX)
        return bool(answer.item())

    def gather(self, row: torch.Tensor) -> list[torch.Tensor]:
        """The rows of all processes, by rank, on the CPU; the same shape and dtype everywhere."""
        if self.count == 1:
            return [row.cpu()]
        rows = [torch.empty_like(row, device=self.device) for _ in range(self.count)]
        torch.distributed.all_gather(rows, row.to(self.device))
        return [r.cpu() for r in rows]

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            torch.distributed.barrier()


def choose_device(name: str | None = None) -> torch.device:
    """The device of that name; without a name CUDA if there is any, else the CPU. `cuda` is this process's
    own.
    """
    kind = name or ("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if kind == "cuda" else torch.device(kind)


@contextmanager
def join_processes(expected: int, device: str | None = None) -> Iterator[Process]:
    """Joins the processes that torchrun started.

    Raises:
        ValueError: they are not as many as the run says.
    """
    count, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if count != expected:
        raise ValueError(
            f"the run says {expected} processes (processes x nodes), but {count} were started. `stm pretrain` and the "
            "workflow start as many as it says; by hand it is `torchrun --standalone --nproc-per-node "
            f"{expected}` of a program that calls stm.training.pretrain"
        )
    chosen = choose_device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if count > 1:
        torch.distributed.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield Process(rank, count, chosen)
    finally:
        if count > 1:
            torch.distributed.destroy_process_group()
