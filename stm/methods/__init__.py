"""Methods: each combines a masking strategy, models and objectives into one training step.

A method is a module of this package, named after the `method` of a run, that defines a function

    def build(run, text_width): ...

that returns a `Method` (see base.py) with newly initialised weights. Methods are found by name, so no registration is
needed. A module may also define `load(run, weights)`, for methods whose reconstructions are shown in the report.
"""

import importlib
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from stm.config import AnyRun
from stm.data.guides.window import COMPUTED
from stm.masking import get_strategy
from stm.methods.base import TEACHER_GUIDE, Method, Part, Reconstructing
from stm.models.checkpointing import set_checkpointing

__all__ = [
    "TEACHER_GUIDE",
    "Method",
    "Needs",
    "Part",
    "Reconstructing",
    "build_method",
    "dataset_needs",
    "load_method",
]


class Needs(NamedTuple):
    """What a dataset must provide for a method."""

    guides: tuple[str, ...]  # in addition to the noise
    text: bool  # whether caption vectors are needed


def dataset_needs(run: AnyRun) -> Needs:
    """What the run's dataset must provide, excluding guides that the method computes in the training step.

    Raises:
        ValueError: the masking strategy does not exist.
    """
    guides = dict.fromkeys(guide for mask in run.masks for guide in get_strategy(mask.strategy).needs)
    return Needs(tuple(guide for guide in guides if guide not in COMPUTED), run.text_vectors_for is not None)


def build_method(run: AnyRun, text_width: int | None = None) -> Method:
    """Builds the method of a run with newly initialised weights; seed torch first for reproducible weights.

    Args:
        run: the settings.
        text_width: width of the caption vectors; required for a run with `contrast`.

    Raises:
        ValueError: the masking strategy does not exist, the mask hides no token, a model cannot be loaded, or the text
            width is missing.
    """
    method: Method = _import_method(run).build(run, text_width)
    set_checkpointing(method, run.gradient_checkpointing)
    return method


def load_method(run: AnyRun, weights: Path) -> Reconstructing:
    """Loads the method of a run that `reconstructs`, with its trained weights and in eval mode, for the report.

    Raises:
        ValueError: the file cannot be read or does not fit the run, or runs of this method do not predict pixels.
    """
    module = _import_method(run)
    if not hasattr(module, "load"):
        raise ValueError(f"runs of the method {run.method} do not predict pixels: there is no reconstruction to load")
    method: Reconstructing = module.load(run, weights)
    return method


def _import_method(run: AnyRun) -> ModuleType:
    """Imports the module of a run's method only when needed: transformers and open_clip take seconds to import."""
    return importlib.import_module(f"{__name__}.{run.method}")
