"""What training asks of a method, whichever it is."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from stm.data.loader import Batch
from stm.models.vit import VideoEncoder, VideoMAE

TEACHER_GUIDE = "attention"
"""The guide that no dataset holds: a run's frozen teacher makes it in each step (UMT)."""


class Part(NamedTuple):
    """What is saved beside the student."""

    state: dict[str, Tensor]
    about: dict[str, Any]  # what is needed to build it, as JSON values


class Method(nn.Module, ABC):
    """Base of all methods.

    Its forward takes a batch and returns float32 scalars by name: "loss" is minimised, all are logged. It reads only tensors
    of the batch. A method overrides what it needs beside that; training asks nothing else.
    """

    takes_turns = False  # whether some steps leave parameters without a gradient; see stm/distributed/process.py
    teacher: nn.Module | None

    def __init__(self, teacher: nn.Module | None) -> None:
        """
        Args:
            teacher: frozen. It is not part of this module: neither saved, nor trained, nor exchanged between processes. It
                moves to devices with it.
        """
        super().__init__()
        self.__dict__["teacher"] = teacher  # past nn.Module's registration

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Method":
        """Moves the teacher along, when all else is moved."""
        if self.teacher is not None:
            self.teacher._apply(fn, recurse)
        super()._apply(fn, recurse)
        return self

    @property
    @abstractmethod
    def student(self) -> VideoMAE | VideoEncoder:
        """What `init` gives weights to, and what a run saves for evaluation."""

    @property
    def teacher_identity(self) -> Mapping[str, Any] | None:
        """The teacher's model and the hash of its weights; None without a teacher."""
        return getattr(self.teacher, "identity", None)

    def accept_text_model(self, text_model: dict[str, str] | None) -> None:
        """Takes note of the encoder that made the captions' packed vectors; None where the shards do not say.

        Raises:
            ValueError: the method cannot use its vectors.
        """

    def prepare(self, batch: Batch) -> Batch:
        """A batch of the loader, on the CPU, with what the method makes of it before it is moved to the device."""
        return batch

    def parts(self) -> dict[str, Part]:
        """What is saved beside the student, by name."""
        return {}


class Reconstructing(Protocol):
    """A method that predicts pixels."""

    def reconstruct(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """See `stm.methods.mae.MAE.reconstruct`."""
