"""What all processes of a run hold, in one tensor, with gradients.

Several processes shall learn what one would from their joined batch. DDP takes the MEAN of the processes'
gradients. So each process returns a loss whose mean over the processes is the joined batch's loss, and the
gradient that flows back through `gather` is that of the SUM of all processes' losses: the mean divides it again.
"""

from typing import Any

import torch
import torch.distributed
from torch import Tensor


def count_processes() -> int:
    """Processes of the run; 1 where none were joined."""
    joined = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if joined else 1


def own_rank() -> int:
    """This process's number among them."""
    return torch.distributed.get_rank() if count_processes() > 1 else 0


# Operators of our own, each one node of a compiled graph. torch's functions (torch.distributed.nn) are deprecated and
# refuse to be compiled, and an autograd.Function becomes a graph within the graph, which DDP's optimiser of compiled
# graphs refuses in older versions of torch.
@torch.library.custom_op("stm::gather_rows", mutates_args=())
def _gather_rows(part: Tensor) -> Tensor:
    parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(count_processes())]
    torch.distributed.all_gather(parts, part.contiguous())
    return torch.cat(parts)


@torch.library.custom_op("stm::add_rows", mutates_args=())
def _add_rows(whole: Tensor) -> Tensor:
    # The sum of all, of which a process takes its part: gloo has no reduce-scatter in all versions.
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
    """The rows of all processes, by rank: [n, ...] -> [processes x n, ...]; `part` itself where there is one.

    All processes must call it together, with the same number of rows.
    """
    if count_processes() == 1:
        return part
    whole: Tensor = _gather_rows(part)
    return whole
