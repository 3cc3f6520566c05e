"""The interface between training and a method."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from stm.data.loader import Batch
from stm.models.vit import VideoEncoder, VideoMAE

TEACHER_GUIDE = "attention"
"""The guide that is not read from the dataset: a run's frozen teacher computes it in each step (UMT)."""


class Part(NamedTuple):
    """A module that is saved along with the student."""

    state: dict[str, Tensor]
    about: dict[str, Any]  # JSON values needed to rebuild it


class Method(nn.Module, ABC):
    """Base class of all methods.

    `forward` maps a batch to named float32 scalars: "loss" is minimised, and all are logged. It reads only the batch's
    tensors. Training uses only this interface; a method overrides the members with defaults as needed.
    """

    has_unused_parameters = (
        False  # whether some steps leave parameters without a gradient; see stm/distributed/process.py
    )
    teacher: nn.Module | None

    def __init__(self, teacher: nn.Module | None) -> None:
        """
        Args:
            teacher: the frozen teacher. It is not registered as a submodule, so it is neither saved, trained nor
                synchronised between processes, but it moves between devices with this module.
        """
        super().__init__()
        self.__dict__["teacher"] = teacher  # bypasses nn.Module's registration of submodules

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Method":
        """Applies `fn` to the teacher as well: `to`, `cuda` and `float` all call this method."""
        if self.teacher is not None:
            self.teacher._apply(fn, recurse)
        super()._apply(fn, recurse)
        return self

    @property
    @abstractmethod
    def student(self) -> VideoMAE | VideoEncoder:
        """The model that `init` initialises, and that a run saves for evaluation."""

    @property
    def teacher_identity(self) -> Mapping[str, Any] | None:
        """The teacher's model and the hash of its weights; None without a teacher."""
        return getattr(self.teacher, "identity", None)

    def accept_text_model(self, text_model: dict[str, str] | None) -> None:
        """Records which encoder computed the packed caption vectors; None if the shards do not name it.

        Raises:
            ValueError: the method cannot use this encoder's vectors.
        """

    def prepare(self, batch: Batch) -> Batch:
        """Adds the method's inputs to a batch from the loader, on the CPU, before it is moved to the device."""
        return batch

    def parts(self) -> dict[str, Part]:
        """Modules to save along with the student, by name."""
        return {}


class Reconstructing(Protocol):
    """A method that predicts pixels."""

    def reconstruct(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """See `stm.methods.mae.MAE.reconstruct`."""
