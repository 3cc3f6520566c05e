"""Methods: how a masking strategy, models and objectives make one training step.

A method is a module whose forward takes a batch and returns named values, of which "loss" is the one to
minimise; all are logged. It reads only tensors of the batch. `method.model` is what is saved;
`method.model.encoder` is what is evaluated.
"""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from stm.config import LanguageRun, PretrainRun
from stm.data.guides.window import COMPUTED
from stm.masking import get_strategy
from stm.methods.contrast_head import load_contrast_head
from stm.methods.mae import MAE, TEACHER_GUIDE
from stm.models.weights import zoo

if TYPE_CHECKING:
    from stm.methods.video_language import VideoLanguage


__all__ = ["MAE", "TEACHER_GUIDE", "Needs", "build_method", "dataset_needs", "load_method"]


class Needs(NamedTuple):
    """What a data set must provide for a method."""

    guides: tuple[str, ...]  # beside the noise
    text: bool  # vectors of the captions


def dataset_needs(run: PretrainRun | LanguageRun) -> Needs:
    """What the run's data set must provide; what a teacher makes in the training step is not among it.

    Raises:
        ValueError: the masking strategy does not exist.
    """
    guides = dict.fromkeys(guide for mask in run.masks for guide in get_strategy(mask.strategy).needs)
    text = run.method == "clusterstm" if isinstance(run, LanguageRun) else run.contrast is not None
    return Needs(tuple(guide for guide in guides if guide not in COMPUTED), text)


def build_method(run: PretrainRun | LanguageRun, text_width: int | None = None) -> "MAE | VideoLanguage":
    """The method of a run, with fresh weights; seed torch before for the same ones.

    Args:
        run: the settings.
        text_width: of the captions' vectors; needed by a run with `contrast`.

    Raises:
        ValueError: the masking strategy does not exist, the mask hides nothing, a model cannot be loaded, or the width is
            missing.
    """
    if isinstance(run, LanguageRun):
        from stm.methods.language_runs import build_language_method  # transformers and open_clip take seconds to import

        return build_language_method(run, text_width)
    return MAE.of(run, text_width)


def load_method(run: PretrainRun, weights: Path) -> MAE:
    """The method of a run with its trained weights, in eval mode, to look at what it has learned.

    Raises:
        ValueError: the file cannot be read or does not fit the run.
    """
    contrast = load_contrast_head(weights) if run.contrast is not None else None
    method = MAE.of(run, contrast.text_width if contrast is not None else None)
    method.model.load_state_dict(zoo.load(weights).state_dict())
    method.contrast = contrast
    return method.eval()
