"""AdamW, its parameter groups and the learning rate schedule."""

import math
import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from stm.config import Optimisation

_BLOCK = re.compile(r"(?:^|\.)blocks\.(\d+)\.")
_EMBEDDING = re.compile(r"(?:^|\.)(patch_embed\w*|embed\w*|pos\w*)(?:\.|$)")


def scale_learning_rate(settings: Optimisation) -> tuple[float, float, float]:
    """The initial warm-up, peak and final learning rates for the batch size; the settings specify them for 256 clips.

    This is the linear scaling rule of VideoMAE's scripts. Without `scale_by_batch` they are not scaled.
    """
    factor = settings.batch_size / 256 if settings.scale_by_batch else 1.0
    return (
        settings.warmup_learning_rate * factor,
        settings.learning_rate * factor,
        settings.min_learning_rate * factor,
    )


def layer_of_parameter(name: str, depth: int) -> int:
    """The layer index of a parameter, by its name: 0 for the embedding, 1 to depth for the blocks, depth + 1 after them."""
    if match := _BLOCK.search(name):
        return int(match[1]) + 1
    return 0 if _EMBEDDING.search(name) else depth + 1


def layer_scale(layer: int, depth: int, decay: float) -> float:
    """The factor of a layer's learning rate, `decay ** (depth + 1 - layer)`: 1 for the head.

    This is VideoMAE's fine-tuning recipe. It replaces timm's grouping, which assigns the last block's scale to the final norm.
    """
    return decay ** (depth + 1 - layer)


def _is_vector(parameter: Tensor) -> bool:
    """Whether this is a bias, a norm or a learned token [1, 1, D]; VideoMAE and UMT do not decay any of them.

    They do decay scalars (a temperature, STM's mix), because both exclude parameters of exactly one dimension.
    """
    return parameter.ndim == 1 or (parameter.ndim > 2 and parameter.numel() == parameter.shape[-1])


def _undecayed_names(module: nn.Module) -> set[str]:
    names: Callable[[], set[str]] = getattr(module, "no_weight_decay", set)
    return names()


def group_parameters(
    module: nn.Module, weight_decay: float, scale_of: Callable[[str], float] | None = None
) -> list[dict[str, object]]:
    """Groups for AdamW, in the order of the module's parameters.

    Args:
        module: its trained parameters are grouped; frozen ones are skipped.
        weight_decay: applied to all parameters, scalars included, except biases and other vectors (norms, mask tokens) and
            those that a submodule names in `no_weight_decay()`, which timm's and VideoMAE's models define as well.
        scale_of: returns the learning rate factor for a parameter name; 1 by default.

    Returns:
        Groups with `params`, `weight_decay`, and `lr_scale`, which `Schedule` applies.
    """
    named = {id(getattr(part, name, None)) for part in module.modules() for name in _undecayed_names(part)}
    groups: dict[tuple[float, float, bool], dict[str, object]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        scale = scale_of(name) if scale_of else 1.0
        # Scalars get separate groups: FSDP cannot shard them, and a fused step rejects a mix of sharded and whole tensors.
        decay = 0.0 if _is_vector(parameter) or id(parameter) in named else weight_decay
        key = (decay, scale, parameter.ndim == 0)
        group = groups.setdefault(key, {"params": [], "weight_decay": key[0], "lr_scale": scale})
        members = group["params"]
        assert isinstance(members, list)
        members.append(parameter)
    return list(groups.values())


def build_optimizer(
    module: nn.Module, settings: Optimisation, *, layer_decay: float = 1.0, depth: int = 0
) -> torch.optim.AdamW:
    """AdamW over a module's trained parameters, with the fused kernel: on a CPU, four times as fast as looping over them.

    Args:
        module: already on its device. It may define `learning_rate_factors`, keyed by parameter name (STM's learned mix).
        settings: learning rate, betas and weight decay.
        layer_decay: 1 for the same learning rate in all layers.
        depth: encoder blocks; needed with `layer_decay` below 1.
    """

    own: Mapping[str, float] = getattr(module, "learning_rate_factors", {})

    def scale_of(name: str) -> float:
        by_layer = layer_scale(layer_of_parameter(name, depth), depth, layer_decay) if layer_decay < 1 else 1.0
        return by_layer * own.get(name, 1.0)

    groups = group_parameters(module, settings.weight_decay, scale_of)
    _, peak, _ = scale_learning_rate(settings)
    # If not fused, None rather than False: with None torch chooses its foreach kernels, with False a loop over parameters.
    fused = all(p.device.type in ("cuda", "cpu") for p in module.parameters())
    return torch.optim.AdamW(groups, lr=peak, betas=settings.betas, fused=fused or None)


class Schedule:
    """Linear warm-up, then half a cosine; see `learning_rate_at`. It has no state, so checkpoints do not include it."""

    def __init__(self, optimizer: torch.optim.Optimizer, settings: Optimisation, steps_per_epoch: int) -> None:
        self.optimizer = optimizer
        self.settings = settings
        self.steps = settings.epochs * steps_per_epoch
        # Rounded to whole steps, because the settings may specify a fraction of an epoch.
        self.warmup = min(round(settings.warmup_epochs * steps_per_epoch), self.steps)

    def step_update(self, step: int) -> None:
        """Set the learning rates of optimiser step `step`; call it before each step, which are counted from 0."""
        rate = learning_rate_at(step, self.warmup, self.steps, self.settings)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]


def learning_rate_at(step: int, warmup: int, steps: int, settings: Optimisation) -> float:
    """The learning rate of a step, scaled for the batch size.

    Args:
        step: from 0.
        warmup: steps of the warm-up.
        steps: steps of the whole run.
        settings: the schedule and its three rates. `interpolated` is VideoMAE's cosine_scheduler: the last step of the
            warm-up and the first one after it both have the peak, and the cosine runs from the peak to the minimum.
            `clamped` is UMT's: a warm-up that reaches the peak after its last step and a cosine from the peak to 0, both
            nowhere below the minimum.
    """
    start, peak, end = scale_learning_rate(settings)
    cosine = (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1))) / 2
    if settings.schedule == "clamped":
        return max(end, start + (peak - start) * step / warmup if step < warmup else peak * cosine)
    if step < warmup:
        return start + (peak - start) * step / max(warmup - 1, 1)
    return end + (peak - end) * cosine


def current_learning_rate(optimizer: torch.optim.Optimizer) -> float:
    """The learning rate of the layers whose scale is 1."""
    # STM's mix has a scale above 1, so its learning rate is not the run's.
    return max(float(group["lr"]) for group in optimizer.param_groups if group.get("lr_scale", 1.0) <= 1)
