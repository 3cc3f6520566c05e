"""Builds models from configs, and is the single entry point for reading and writing weights in any format.

`safetensors`, `videomae`, `transformers` and `timm` handle one format each; `export` writes folders with model cards.
"""

import logging
from pathlib import Path

from torch import Tensor, nn

from stm.config import Run
from stm.jobs.progress import say
from stm.models.architecture import Architecture, describe
from stm.models.sizes import SIZES, Size
from stm.models.vit import VideoEncoder, VideoMAE
from stm.models.weights.card import UNKNOWN, Format
from stm.models.weights.checks import Weights, WeightsError, adapt, build_encoder, build_module, gather_weights
from stm.models.weights.classifier import VideoClassifier
from stm.models.weights.export import check_format, export
from stm.models.weights.provenance import CLASSIFIER_NAME, OWN_NAME, own_file
from stm.models.weights.safetensors import HEADER_KEY, load_extra, read_own, save
from stm.models.weights.timm import read_timm, read_timm_config, to_timm
from stm.models.weights.transformers import read_transformers, to_transformers_state, transformers_config
from stm.models.weights.videomae import CHECKPOINT_NAME, read_official
from stm.pretrained.hub import ModelError, ModelSource, find_model

_log = logging.getLogger(__name__)

__all__ = [
    "HEADER_KEY",
    "SIZES",
    "Format",
    "Size",
    "Weights",
    "WeightsError",
    "build",
    "convert",
    "count_parameters",
    "describe",
    "load",
    "load_any",
    "load_classifier",
    "load_encoder",
    "load_extra",
    "read",
    "save",
    "to_timm",
    "to_transformers",
    "transformers_config",
]

_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")


def build(run: Run) -> VideoMAE:
    """Build a randomly initialised model for a run; seed torch first for reproducible weights."""
    return VideoMAE(describe(run), run.drop_path)


def count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def load(path: Path, drop_path: float = 0.0) -> VideoMAE:
    """Load a model from a file written by `save`.

    Raises:
        WeightsError: the file is missing or damaged, lacks an stm architecture or a decoder, or its weights do not match.
    """
    model = build_module(read_own(path), drop_path)
    if not isinstance(model, VideoMAE):
        raise WeightsError(f"{path} has an encoder and no decoder: `load_encoder` reads it")
    return model


# -------------------------------------------------------------------------------------------------------
# any source


def read(source: str | Path, architecture: Architecture | None = None, encoder_only: bool = False) -> Weights:
    """Read weights from any supported source, under our names.

    Args:
        source: our safetensors file; a VideoMAE `.pth`; a transformers folder; a timm folder that stm wrote; a folder with our
            `weights.safetensors` or `classifier.safetensors`, or VideoMAE's `checkpoint.pth`. A string that is not a local path
            may be a hub repository (`owner/name`), which transformers then downloads.
        architecture: the architecture of the target model. Its clip length and image size may differ from the
            source's; everything that the weights determine must match. Required only for a `.pth` whose width is not one
            of VideoMAE's sizes.
        encoder_only: whether to drop the decoder or head; the decoders may then differ.

    Raises:
        WeightsError: the source cannot be read or does not match; the message describes the source.
    """
    weights = _read_any(source, architecture)
    _log.debug(f"weights: {source}: {len(weights.tensors)} tensors for {weights.kind}")
    return adapt(weights.encoder() if encoder_only else weights, architecture, str(source))


def _read_any(source: str | Path, architecture: Architecture | None) -> Weights:
    path = Path(source).expanduser()
    if path.is_dir():
        return _read_folder(path, str(source), architecture)
    if path.is_file():
        return _read_file(path, architecture)
    # A mistyped file name must not be looked up on the hub.
    if isinstance(source, Path) or path.suffix in _SUFFIXES:
        raise WeightsError(f"{path}: cannot be read: there is no such file (from the working directory {Path.cwd()})")
    try:
        return read_transformers(find_model(source))
    except ModelError as error:
        raise WeightsError(str(error)) from error


def _read_folder(path: Path, name: str, architecture: Architecture | None) -> Weights:
    if (own := own_file(path)) is not None:
        return read_own(own)
    if (path / CHECKPOINT_NAME).is_file():
        return read_official(path / CHECKPOINT_NAME, architecture)
    config = read_timm_config(path)
    if config is not None:
        return read_timm(path, config)
    if (path / "config.json").is_file():
        return read_transformers(ModelSource(name, path))
    raise WeightsError(
        f"{path}: this folder has neither stm's {OWN_NAME} or {CLASSIFIER_NAME} nor VideoMAE's {CHECKPOINT_NAME}, nor a "
        "config.json of transformers or timm"
    )


def _read_file(path: Path, architecture: Architecture | None) -> Weights:
    """Detect the format from the first bytes, since suffixes are unreliable: safetensors starts with a length and a brace."""
    with path.open("rb") as file:
        start = file.read(9)
    if start[8:9] == b"{" or path.suffix == ".safetensors":
        return read_own(path)
    if start.startswith((b"PK\x03\x04", b"\x80")):  # torch's zip format and its older plain pickle
        return read_official(path, architecture)
    raise WeightsError(f"{path}: neither safetensors nor a torch checkpoint (.pth)")


def load_any(
    source: str | Path, architecture: Architecture | None = None, drop_path: float = 0.0
) -> VideoMAE | VideoEncoder:
    """Load a model from any source (see `read`): a `VideoMAE`, or a `VideoEncoder` if the weights have no decoder."""
    return build_module(read(source, architecture), drop_path)


def load_encoder(source: str | Path, drop_path: float = 0.0, architecture: Architecture | None = None) -> VideoEncoder:
    """Load only the encoder from any source (see `read`); a decoder is ignored, whatever its shape."""
    return build_encoder(read(source, architecture, encoder_only=True), drop_path)


def load_classifier(source: str | Path) -> VideoClassifier:
    """Load a fine-tuned classifier from any source (see `read`).

    Raises:
        WeightsError: the source cannot be read, or has no classifier.
    """
    weights = read(source)
    if weights.kind != "classifier":
        raise WeightsError(f"{source}: has no classifier, but weights of kind {weights.kind}: `load_any` reads them")
    return VideoClassifier(weights)


def convert(
    source: str | Path,
    target: str | Path,
    format: str,
    architecture: Architecture | None = None,
    encoder_only: bool = False,
    license: str = UNKNOWN,
) -> Path:
    """Convert the weights of any source (see `read`) to the given format, with a model card.

    Args:
        source: as in `read`.
        target: the folder to write. For "stm" and "videomae" it may also be a file (`.safetensors`, `.pth`), without a card.
        format: "stm", "transformers", "timm" or "videomae" (VideoMAE's `.pth`, formerly "official").
        architecture: as in `read`; the target is written for this architecture.
        encoder_only: whether to drop the decoder or the classifier's head, and modules saved with the model; in
            transformers, this is a `VideoMAEModel`.
        license: the weights' licence as the hub abbreviates it, such as `apache-2.0`, for the card.

    Modules saved with the model (see `load_extra`) are only kept in stm's own format; what is left out is logged.

    Returns:
        `target`.

    Raises:
        WeightsError: the source cannot be read, or the format cannot represent it.
    """
    checked = check_format(format)
    if checked != format:
        say(f"the format {format} is now called {checked}; the old name will be removed in the next version")
    weights, path = read(source, architecture, encoder_only), Path(target)
    for note in export(weights, source, path, checked, encoder_only, license):
        say(f"{path}: {note}")
    return path


# -------------------------------------------------------------------------------------------------------
# transformers


def to_transformers(model: nn.Module) -> dict[str, Tensor]:
    """Return a state dict for transformers: of VideoMAEForPreTraining for a `VideoMAE` (`use_mean_pooling=False`),
    VideoMAEModel for a `VideoEncoder`, or VideoMAEForVideoClassification for a classifier.
    """
    return to_transformers_state(gather_weights(model))
