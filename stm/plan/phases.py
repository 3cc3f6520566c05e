"""What a training step holds in memory, phase by phase: an encoder, layers of a text, a decoder with its logits."""

from collections.abc import Iterable
from typing import NamedTuple


class Phase(NamedTuple):
    """A part of the forward pass. Bytes per sample."""

    kept: float  # from the forward pass to the phase's own backward pass
    passing: float = (
        0.0  # during its backward pass alone: gradients of activations, and activations that are computed again
    )

    def times(self, count: float) -> "Phase":
        return Phase(count * self.kept, count * self.passing)

    def plus(self, kept: float) -> "Phase":
        return Phase(self.kept + kept, self.passing)


def peak(phases: Iterable[Phase]) -> float:
    """Return the most bytes per sample that a step holds at once.

    Args:
        phases: in the order of the forward pass. The backward pass goes through them in reverse, and frees what each one kept.
    """
    held = most = 0.0
    for phase in phases:
        held += phase.kept
        most = max(most, held + phase.passing)
    return most
