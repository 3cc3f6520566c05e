"""All-gather with gradients: the rows of all processes of a run in one tensor.

Several processes must compute the same update as a single process would from their joint batch. DDP averages the processes'
gradients. Each process therefore returns a loss whose mean over the processes is the loss of the joint batch, and the
gradient that flows back through `gather` is that of the SUM of all processes' losses: DDP's MEAN divides it again.
"""

from typing import Any

import torch
import torch.distributed
from torch import Tensor


def count_processes() -> int:
    """Return the number of processes of the run; 1 if no process group is initialised."""
    joined = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if joined else 1


def own_rank() -> int:
    """Return the rank of this process."""
    return torch.distributed.get_rank() if count_processes() > 1 else 0


# Custom operators, each a single node of a compiled graph. torch's own functions (torch.distributed.nn) are deprecated and
# cannot be compiled, and an autograd.Function becomes a subgraph, which DDP's optimiser of compiled graphs rejects in older
# versions of torch.
@torch.library.custom_op("stm::gather_rows", mutates_args=())
def _gather_rows(part: Tensor) -> Tensor:
    parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(count_processes())]
    torch.distributed.all_gather(parts, part.contiguous())
    return torch.cat(parts)


@torch.library.custom_op("stm::add_rows", mutates_args=())
def _add_rows(whole: Tensor) -> Tensor:
    # All-reduce, then select this process's rows: not every version of gloo supports reduce-scatter.
    total = whole.clone(memory_format=torch.contiguous_format)
    torch.distributed.all_reduce(total)
    rows = total.shape[0] // count_processes()
    return total.narrow(0, own_rank() * rows, rows).clone()


@_gather_rows.register_fake
def _(part: Tensor) -> Tensor:
    return part.new_empty((part.shape[0] * count_processes(), *part.shape[1:]))


@_add_rows.register_fake
def _(whole: Tensor) -> Tensor:
    return whole.new_empty((whole.shape[0] // count_processes(), *whole.shape[1:]))


def _differentiate(ctx: Any, gradient: Tensor) -> Tensor:
    added: Tensor = _add_rows(gradient)
    return added


_gather_rows.register_autograd(_differentiate)


def gather(part: Tensor) -> Tensor:
    """Gather the rows of all processes in rank order: [n, ...] -> [processes x n, ...]; `part` itself for one process.

    All processes must call it at the same point, with the same number of rows.
    """
    if count_processes() == 1:
        return part
    whole: Tensor = _gather_rows(part)
    return whole
