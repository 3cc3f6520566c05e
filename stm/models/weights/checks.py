"""Weights under our names, regardless of the source format, and the checks shared by all formats.

Names are those of a `VideoMAE` ("encoder.*", "decoder.*"), of an encoder alone ("encoder.*"), or of a
classifier: an encoder, "fc_norm.*" and "head.*", as in `stm.evaluation.classification.finetune.Classifier`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Size, Tensor, nn

from stm.models.vit import Architecture, VideoEncoder, VideoMAE

Kind = Literal["pretraining", "encoder", "classifier"]

# The fields that trained weights depend on. Clip length and image size are excluded, because the position table is fixed and
# can be computed for any number of tokens. The kind of table is included: weights trained with one kind produce garbage
# with a different one, and shapes do not reveal the mismatch.
ENCODER_FIELDS = ("patch_size", "tubelet", "width", "depth", "heads", "mlp_ratio", "positions", "position_period")
DECODER_FIELDS = ("decoder_width", "decoder_depth", "decoder_heads")

# Headers are untrusted: these bounds keep a forged one from exhausting memory.
_MAX = {"depth": 1000, "decoder_depth": 1000}
_MAX_OTHERS = 2**16
_MAX_TOKENS = 2**20


class WeightsError(ValueError):
    """A weights file cannot be used; the message names the file, its kind, and the mismatch."""


@dataclass(frozen=True)
class Weights:
    """A state dict under our names, and everything needed to build its model."""

    architecture: Architecture
    tensors: Mapping[str, Tensor]
    labels: tuple[str, ...] | None = None  # a classifier's class names, in logit order

    @property
    def kind(self) -> Kind:
        if "head.weight" in self.tensors:
            return "classifier"
        return "pretraining" if any(name.startswith("decoder.") for name in self.tensors) else "encoder"

    @property
    def classes(self) -> int:
        """Number of a classifier's classes; 0 for other weights."""
        return len(self.tensors["head.weight"]) if self.kind == "classifier" else 0

    def encoder(self) -> "Weights":
        """Return only the encoder's tensors."""
        kept = {name: tensor for name, tensor in self.tensors.items() if name.startswith("encoder.")}
        return Weights(self.architecture, kept)


def gather_weights(module: nn.Module, labels: Iterable[str] | None = None) -> Weights:
    """Collect the weights of a `VideoMAE`, a `VideoEncoder`, or a classifier around an encoder."""
    prefix = "encoder." if isinstance(module, VideoEncoder) else ""
    holder = module if isinstance(module, VideoEncoder | VideoMAE) else getattr(module, "encoder", None)
    architecture = getattr(holder, "architecture", None)
    if not isinstance(architecture, Architecture):
        raise TypeError(f"{type(module).__name__} must be a VideoMAE or VideoEncoder, or have one as its `encoder`")
    tensors = {f"{prefix}{name}": tensor.detach().cpu() for name, tensor in module.state_dict().items()}
    weights = Weights(architecture, tensors)
    named = parse_labels(None if labels is None else list(labels), weights.classes, type(module).__name__)
    return replace(weights, labels=named)


def build_module(weights: Weights, drop_path: float = 0.0) -> VideoMAE | VideoEncoder:
    """Build a `VideoMAE`, or a `VideoEncoder` if the weights have no decoder; a classifier's head is dropped."""
    if weights.kind == "pretraining":
        model = VideoMAE(weights.architecture, drop_path)
        model.load_state_dict(dict(weights.tensors))
        return model
    return build_encoder(weights, drop_path)


def build_encoder(weights: Weights, drop_path: float = 0.0) -> VideoEncoder:
    """Build only the encoder, from weights of any kind."""
    encoder = VideoEncoder(weights.architecture, drop_path)
    encoder.load_state_dict({n.removeprefix("encoder."): t for n, t in weights.encoder().tensors.items()})
    return encoder


def outline(architecture: Architecture, kind: Kind, classes: int = 0) -> dict[str, Tensor]:
    """Names and shapes of such weights, as tensors without data (device "meta")."""
    # Names and shapes are checked before allocating memory for weights.
    with torch.device("meta"):
        if kind == "pretraining":
            return dict(VideoMAE(architecture).state_dict())
        tensors = {f"encoder.{name}": tensor for name, tensor in VideoEncoder(architecture).state_dict().items()}
        if kind == "classifier":
            width = architecture.width
            parts = {"fc_norm": nn.LayerNorm(width), "head": nn.Linear(width, classes)}
            tensors |= {
                f"{part}.{name}": t for part, module in parts.items() for name, t in module.state_dict().items()
            }
        return tensors


def check_tensors(actual: Mapping[str, Any], expected: Mapping[str, Tensor], what: str) -> None:
    """Compare the names and shapes in a file with the expected ones.

    Raises:
        WeightsError: they differ; the message starts with `what` and lists the first five differences of each kind.
    """
    shapes = {name: tensor.shape for name, tensor in actual.items() if isinstance(tensor, Tensor)}
    differences = {
        "no tensors": sorted(actual.keys() - shapes.keys()),
        "missing": sorted(expected.keys() - actual.keys()),
        "not expected": sorted(shapes.keys() - expected.keys()),
        "of the wrong shape": [
            f"{name} ({_size(shapes[name])} instead of {_size(expected[name].shape)})"
            for name in sorted(shapes.keys() & expected.keys())
            if shapes[name] != expected[name].shape
        ],
    }
    raise_differences(differences, what)


def raise_differences(differences: Mapping[str, Sequence[str]], what: str) -> None:
    """Raise WeightsError with the first five names of each kind of difference, if any."""
    parts = [f"{len(names)} {kind}: {_first(names)}" for kind, names in differences.items() if names]
    if parts:
        raise WeightsError(f"{what}, but its weights do not fit: {'; '.join(parts)}")


def adapt(weights: Weights, architecture: Architecture | None, what: str) -> Weights:
    """Adapt weights to a run's architecture, whose clip length or image size may differ.

    Raises:
        WeightsError: the architectures differ in a field that the weights determine; the message starts with `what`,
            the source.
    """
    if architecture is None:
        return weights
    checked = ENCODER_FIELDS + (DECODER_FIELDS if weights.kind == "pretraining" else ())
    differ = [
        f"{name} {getattr(weights.architecture, name)} instead of {getattr(architecture, name)}"
        for name in checked
        if getattr(weights.architecture, name) != getattr(architecture, name)
    ]
    if differ:
        raise WeightsError(f"{what}: its architecture is not the run's: {', '.join(differ)}")
    return replace(weights, architecture=architecture)


def check_positions(architecture: Architecture, format_name: str) -> None:
    """Check that the target format's code computes the same position embeddings as this model.

    Raises:
        WeightsError: its position table is not VideoMAE's.
    """
    if architecture.position_frames not in (None, architecture.frames):
        raise WeightsError(
            f"this model's positions are stretched from {architecture.position_frames} frames to {architecture.frames}, and "
            f"{format_name} does not stretch them: it would compute something else. Export to timm, which takes the table along"
        )
    if (architecture.positions, architecture.position_period) != ("joint", 10000.0):
        raise WeightsError(
            f"this model has {architecture.positions} positions of period {architecture.position_period:g}, and {format_name} "
            "makes VideoMAE's table (joint, 10000) itself: it would compute something else. Export to timm, which "
            "takes the table along, or pretrain with `positions: joint`"
        )


def parse_architecture(values: Any, what: str) -> Architecture:
    """Parse the architecture from a file's untrusted header.

    Raises:
        WeightsError: fields are missing, unknown or out of range; the message starts with `what`.
    """
    try:
        architecture = Architecture(**values)
    except TypeError as error:
        raise WeightsError(f"{what} was written by another version of stm: {error}. Pretrain again") from error
    for field in fields(architecture):
        value = getattr(architecture, field.name)
        if value is None and field.default is None:
            continue
        minimum = 0 if field.name.startswith("decoder_") else 1  # encoder-only weights may lack decoder sizes
        # Ratios, epsilons and periods; integers and strings are checked below.
        good = isinstance(value, int | float) and 0 < value <= 1e6
        if field.name == "positions":
            good = value in ("joint", "separable")
        if field.type in (int, "int", int | None, "int | None"):
            good = isinstance(value, int) and minimum <= value <= _MAX.get(field.name, _MAX_OTHERS)
        if not good:
            raise WeightsError(f"{what}: invalid {field.name} {value!r} in its architecture")
    return _check_divisions(architecture, what)


def parse_labels(labels: Any, classes: int, what: str) -> tuple[str, ...] | None:
    """Parse a classifier's class names from a file's header or a caller; None if there are none.

    Raises:
        WeightsError: they are not strings, or their number is not `classes`; the message starts with `what`.
    """
    if labels is None:
        return None
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise WeightsError(f"{what}: the names of its classes must be a list of strings")
    if len(labels) != classes:
        raise WeightsError(f"{what}: {len(labels)} names for {classes} classes")
    return tuple(labels)


def _check_divisions(a: Architecture, what: str) -> Architecture:
    """Raise WeightsError if a size is not divisible as required, or there are too many tokens for memory."""
    divisions = [("image_size", "patch_size"), ("frames", "tubelet"), ("width", "heads")]
    divisions += [("decoder_width", "decoder_heads")] if a.decoder_heads else []
    for whole, part in divisions:
        if getattr(a, whole) % getattr(a, part):
            raise WeightsError(f"{what}: its {whole} {getattr(a, whole)} is not divisible by {part} {getattr(a, part)}")
    tokens = max(a.frames, a.position_frames or 0) // a.tubelet * a.slot_tokens
    if tokens > _MAX_TOKENS:
        raise WeightsError(f"{what}: its architecture has {tokens} tokens per clip; the maximum is {_MAX_TOKENS}")
    return a


def _size(shape: Size) -> str:
    return "x".join(str(length) for length in shape) or "scalar"


def _first(names: Sequence[str], number: int = 5) -> str:
    return ", ".join(names[:number]) + (", …" if len(names) > number else "")
