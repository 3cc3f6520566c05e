"""Methods: how a masking strategy, models and objectives make one training step.

A method is a module whose forward takes a batch and returns named losses, of which "loss" is the one to
minimise. It reads only tensors of the batch. `method.model` is what is saved; `method.model.encoder` is what
is evaluated.
"""

from stm.config import PretrainRun
from stm.methods.mae import MAE


def build_method(run: PretrainRun) -> MAE:
    """The method of a run, with fresh weights; seed torch before for the same ones.

    Raises:
        ValueError: the masking strategy does not exist, or the mask hides nothing.
    """
    return MAE.of(run)
