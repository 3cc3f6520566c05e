"""Initialises a run with the weights of an existing model (`init`)."""

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from stm.models.vit import VideoEncoder, VideoMAE
from stm.models.weights.checks import DECODER_FIELDS
from stm.models.weights.initialise import read_initial

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """The weights that were loaded."""

    sha256: str  # of tensor names and values, so the same weights in a different file format have the same hash
    decoder: bool  # whether they include the decoder's weights


def start_from(model: VideoMAE | VideoEncoder, source: str) -> Start:
    """Loads the encoder's weights into `model`, and the decoder's if they fit; logs what is ignored.

    Args:
        model: the run's model, or its encoder alone; its clip length and image size may differ from the source's.
        source: anything that `stm.models.weights.initialise.read_initial` can read. Its contrastive head, if any, is ignored:
            it belongs to the source's text encoder.

    Raises:
        ValueError: the source cannot be read, or its encoder has a different architecture.
    """
    weights, notes = read_initial(source, model.architecture)
    for note in notes:
        _log.info(f"init: {source}: {note}")
    taken = dict(weights.encoder().tensors)
    encoder = model if isinstance(model, VideoEncoder) else model.encoder
    encoder.load_state_dict(_inside(taken, "encoder."))
    if isinstance(model, VideoEncoder):
        return Start(hash_tensors(taken), False)
    fields = (*DECODER_FIELDS, "decoder_depth")
    decoder = weights.kind == "pretraining" and all(
        getattr(weights.architecture, name) == getattr(model.architecture, name) for name in fields
    )
    if decoder:
        taken |= {name: tensor for name, tensor in weights.tensors.items() if name.startswith("decoder.")}
        model.decoder.load_state_dict(_inside(taken, "decoder."))
    else:
        why = "its decoder differs" if weights.kind == "pretraining" else "it has no decoder"
        _log.info(f"init: {source}: {why}; the run's decoder is freshly initialised")
    return Start(hash_tensors(taken), decoder)


def _inside(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def hash_tensors(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of a state dict's names, dtypes, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
