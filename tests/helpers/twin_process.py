"""A stand-in for one of two processes, for tests of the training loop in a single one."""

import torch
from torch import nn

from stm.distributed.process import Process


class Twin(Process):
    """One of two processes, of which the other does the same."""

    def any(self, flag: bool) -> bool:
        return flag

    def gather(self, row: torch.Tensor) -> list[torch.Tensor]:
        return [row, row]

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        return values

    def wait(self) -> None:
        pass

    def wrap(self, module: nn.Module) -> nn.Module:
        return module
