"""Weights that a run starts from, instead of fresh ones (`init`)."""

import hashlib
from dataclasses import dataclass

from torch import Tensor

from stm.models import zoo
from stm.models.vit import VideoMAE
from stm.models.weights import DECODER_FIELDS, adapt
from stm.training.logs import say


@dataclass(frozen=True)
class Start:
    """What was taken over."""

    sha256: str  # of names and values, so that the same weights in another format are the same start
    decoder: bool  # whether the decoder's were taken too


def start_from(model: VideoMAE, source: str) -> Start:
    """Loads the encoder's weights into `model`, and the decoder's when they fit; says what it did not take.

    Args:
        model: of the run; clips of another length or picture size than the source's are welcome.
        source: any that `zoo.read` knows. A contrastive head in it is left out: it belongs to its text.

    Raises:
        ValueError: the source cannot be read, or its encoder is another.
    """
    found = zoo.read(source)
    encoder = adapt(found.encoder(), model.architecture, f"init: {source}").tensors
    taken = dict(encoder)
    fields = (*DECODER_FIELDS, "decoder_depth")
    decoder = found.kind == "pretraining" and all(
        getattr(found.architecture, name) == getattr(model.architecture, name) for name in fields
    )
    if decoder:
        taken |= {name: tensor for name, tensor in found.tensors.items() if name.startswith("decoder.")}
    else:
        say(
            f"init: {source}: its decoder is {'another' if found.kind == 'pretraining' else 'not there'}; ours is fresh"
        )
    missing, unexpected = model.load_state_dict(taken, strict=False)
    # Both were checked where the file was read; what is left over now would be a mistake of ours.
    assert not unexpected and all(name.startswith("decoder.") and not decoder for name in missing)
    return Start(hash_tensors(taken), decoder)


def hash_tensors(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of a state dict's names, dtypes, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
