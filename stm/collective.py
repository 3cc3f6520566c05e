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


class _Gather(torch.autograd.Function):
    """Written out, because torch's own (torch.distributed.nn) is deprecated and refuses to be compiled."""

    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(count_processes())]
        torch.distributed.all_gather(parts, part.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        # The sum of all, of which a process takes its part: gloo has no reduce-scatter in all versions.
        total = gradients[0].contiguous().clone()
        torch.distributed.all_reduce(total)
        rows = total.shape[0] // count_processes()
        return total.narrow(0, own_rank() * rows, rows)


def gather(part: Tensor) -> Tensor:
    """The rows of all processes, by rank: [n, ...] -> [processes x n, ...]; `part` itself where there is one.

    All processes must call it together, with the same number of rows.
    """
    if count_processes() == 1:
        return part
    whole: Tensor = _Gather.apply(part)
    return whole
