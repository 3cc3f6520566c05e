"""Activation checkpointing: a block keeps its input alone, and its activations are computed again in the backward pass.

Its random numbers (stochastic depth, dropout) are repeated, so that losses and gradients are those of a run without it.
Only parts without running statistics do it: a batch norm would update its statistics twice.
"""

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stm.config import Checkpointing


class Checkpointed(nn.Module):
    """Base class of modules that run a stack of blocks; their activations are kept until `set_checkpointing` is called."""

    side: ClassVar[Literal["video", "text"]]
    gradient_checkpointing = False

    def recompute(self, on: bool) -> None:
        """Sets whether training computes each block's activations again in the backward pass."""
        self.gradient_checkpointing = on

    def run_block(self, block: nn.Module, *inputs: Tensor) -> Tensor:
        """The output of a block, whose activations are kept or computed again."""
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            repeated: Tensor = checkpoint(block, *inputs, use_reentrant=False)
            return repeated
        once: Tensor = block(*inputs)
        return once


def set_checkpointing(module: nn.Module, parts: Checkpointing) -> None:
    """Sets which stacks of blocks inside a module compute their activations again: the video's, the text's, all or none."""
    for part in module.modules():
        if isinstance(part, Checkpointed):
            part.recompute(parts in ("all", part.side))
