"""Checks a strategy's result on the first batch of each shape in every run.

A wrong mask raises no error in training: a strategy that kept half of the tokens at ratio 0.75 would be reported as 0.75, and
with unsorted tokens the decoder's predictions would be at the wrong positions.
"""

import torch
from torch import Tensor

from stm.masking.tokens import count_masked

_passed: set[tuple[object, ...]] = set()


class MaskError(ValueError):
    """Raised if a strategy returns an invalid result; the message describes the expected and the actual one."""


def start_checks() -> None:
    """Reset the checks, so that the next batch of every strategy is checked again; called when a run starts."""
    _passed.clear()


def check_first(kept: Tensor, noise: Tensor, ratio: float, strategy: str, equal_slots: bool) -> Tensor:
    """Return `kept` unchanged, after checking it if this is the first batch of its shape.

    Waits for the device only for this check. Under torch.compile the check is a single opaque operator, so it does not break
    the graph.

    Args:
        kept: the strategy's result; should be int64 [B, slots * (N - int(ratio * N))].
        noise: [B, slots, N].
        ratio: share of a slot's tokens to hide.
        strategy: the strategy's name, for the message.
        equal_slots: whether each slot must keep the same number of tokens.

    Raises:
        MaskError: the strategy's result is invalid.
    """
    if torch.compiler.is_compiling():
        checked: Tensor = _check_in_graph(kept, list(noise.shape), ratio, strategy, equal_slots)
        return checked
    _check_once(kept, list(noise.shape), ratio, strategy, equal_slots)
    return kept


@torch.library.custom_op("stm::check_mask", mutates_args=())
def _check_in_graph(kept: Tensor, shape: list[int], ratio: float, strategy: str, equal_slots: bool) -> Tensor:
    _check_once(kept, shape, ratio, strategy, equal_slots)
    return kept.clone()  # an operator may not return its own input


@_check_in_graph.register_fake
def _(kept: Tensor, shape: list[int], ratio: float, strategy: str, equal_slots: bool) -> Tensor:
    return torch.empty_like(kept)


def _check_once(kept: Tensor, shape: list[int], ratio: float, strategy: str, equal_slots: bool) -> None:
    form = (kept.dtype, kept.shape) if isinstance(kept, Tensor) else (type(kept), None)
    key = (*form, *shape, ratio, strategy, equal_slots)
    if key in _passed:
        return
    if fault := _find_fault(kept, shape, ratio, equal_slots):
        raise MaskError(
            f"the masking strategy {strategy!r} at ratio {ratio:g} must return {_expected(shape, ratio, equal_slots)}; {fault}"
        )
    _passed.add(key)


def _expected(shape: list[int], ratio: float, equal_slots: bool) -> str:
    batch, slots, tokens = shape
    visible = tokens - count_masked(tokens, ratio)
    kept = f"{visible} kept tokens of {tokens} in each of {slots} slots"
    if not equal_slots:
        kept = f"{slots * visible} kept tokens of {slots * tokens}"
    last = slots * tokens - 1
    return f"{kept}: int64 [{batch}, {slots * visible}], strictly ascending numbers from 0 to {last}"


def _find_fault(kept: Tensor, shape: list[int], ratio: float, equal_slots: bool) -> str | None:
    """A description of the error in the kept tokens; None if they are valid."""
    batch, slots, tokens = shape
    visible = tokens - count_masked(tokens, ratio)
    if not isinstance(kept, Tensor):
        return f"it returned a {type(kept).__name__}"
    if kept.dtype != torch.int64 or kept.shape != (batch, slots * visible):
        hidden = f", which hides {1 - kept.shape[1] / (slots * tokens):.3g} of them" if kept.dim() == 2 else ""
        return f"it returned {str(kept.dtype).removeprefix('torch.')} {list(kept.shape)}{hidden}"
    # Waits for the device, but only on the first batch of a shape.
    values = kept.cpu()
    if not values.numel():
        return None
    if values.min() < 0 or values.max() >= slots * tokens:
        return f"it returned numbers from {values.min()} to {values.max()}"
    falls = (values.diff(dim=1) <= 0).nonzero()
    if len(falls):
        clip, place = falls[0].tolist()
        return f"clip {clip} of the batch has token {values[clip, place]} before token {values[clip, place + 1]}"
    counts = torch.zeros(batch, slots, dtype=torch.int64).scatter_add_(1, values // tokens, torch.ones_like(values))
    uneven = (counts != visible).nonzero()
    if equal_slots and len(uneven):
        clip, slot = uneven[0].tolist()
        return f"slot {slot} of clip {clip} keeps {counts[clip, slot]} (if slots may differ: @register(..., equal_slots=False))"
    return None
