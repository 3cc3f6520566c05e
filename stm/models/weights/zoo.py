"""Builds models from configs, and is the single entry point for reading and writing weights in any format.

`safetensors`, `videomae` and `transformers` handle one format each; `timm` exports timm models.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

from torch import Tensor, nn

from stm.config import Run
from stm.models.architecture import Architecture, describe
from stm.models.sizes import SIZES, Size
from stm.models.vit import VideoEncoder, VideoMAE
from stm.models.weights.checks import Weights, WeightsError, adapt, build_encoder, build_module, gather_weights, outline
from stm.models.weights.safetensors import HEADER_KEY, load_extra, read_own, save, write_own
from stm.models.weights.timm import to_timm
from stm.models.weights.transformers import (
    from_transformers_state,
    read_transformers,
    to_transformers_state,
    transformers_config,
    write_transformers,
)
from stm.models.weights.videomae import read_official, write_official
from stm.pretrained.hub import ModelError, ModelSource, find_model

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
    "from_transformers",
    "load",
    "load_any",
    "load_encoder",
    "load_extra",
    "read",
    "save",
    "to_timm",
    "to_transformers",
    "transformers_config",
]

Format = Literal["stm", "official", "transformers"]
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
        source: our safetensors file; a VideoMAE `.pth`; a transformers folder; a folder with our
            `weights.safetensors`. A string that is not a local path may be a hub repository
            (`owner/name`), which transformers then downloads.
        architecture: the architecture of the target model. Its clip length and image size may differ from the
            source's; everything that the weights determine must match. Required only for a `.pth` whose width is not one
            of VideoMAE's sizes.
        encoder_only: whether to drop the decoder or head; the decoders may then differ.

    Raises:
        WeightsError: the source cannot be read or does not match; the message describes the source.
    """
    weights = _read_any(source, architecture)
    return adapt(weights.encoder() if encoder_only else weights, architecture, str(source))


def _read_any(source: str | Path, architecture: Architecture | None) -> Weights:
    path = Path(source).expanduser()
    if path.is_dir():
        own = path / "weights.safetensors"
        if own.is_file():
            return read_own(own)
        if (path / "config.json").is_file():
            return read_transformers(ModelSource(str(source), path))
        raise WeightsError(f"{path}: this folder has neither stm's weights.safetensors nor transformers' config.json")
    if path.is_file():
        return _read_file(path, architecture)
    # A mistyped file name must not be looked up on the hub.
    if isinstance(source, Path) or path.suffix in _SUFFIXES:
        raise WeightsError(f"{path}: cannot be read: there is no such file (from the working directory {Path.cwd()})")
    try:
        return read_transformers(find_model(source))
    except ModelError as error:
        raise WeightsError(str(error)) from error


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


def convert(
    source: str | Path,
    target: str | Path,
    format: Format,
    architecture: Architecture | None = None,
    encoder_only: bool = False,
) -> Path:
    """Convert the weights of any source (see `read`) to the given format.

    Args:
        source: as in `read`.
        target: a file, or a folder for transformers.
        format: "stm", "official" (VideoMAE's `.pth`) or "transformers".
        architecture: as in `read`; the target is written for this architecture.
        encoder_only: whether to drop the decoder or the classifier's head; in transformers, this is a `VideoMAEModel`.

    Modules saved with the model (see `load_extra`) are not converted.

    Returns:
        `target`.
    """
    if format not in get_args(Format):
        raise WeightsError(f"unknown format {format!r}; there are: {', '.join(get_args(Format))}")
    weights, path = read(source, architecture, encoder_only), Path(target)
    writers = {"stm": write_own, "official": write_official, "transformers": write_transformers}
    writers[format](weights, path)
    return path


# -------------------------------------------------------------------------------------------------------
# state dicts of transformers


def from_transformers(state: Mapping[str, Tensor], architecture: Architecture) -> dict[str, Tensor]:
    """Convert a state dict of transformers' VideoMAEForPreTraining to one of `VideoMAE`, exactly.

    The config must have had `use_mean_pooling=False`: with its default, True, transformers drops the encoder's final
    norm even in pretraining. Set `norm_eps=config.layer_norm_eps, decoder_norm_eps=1e-5` in the architecture.

    Raises:
        WeightsError: weights are missing, unexpected, or of the wrong shape.
    """
    blank = Weights(architecture, outline(architecture, "pretraining"))
    what = (
        "this is read as a VideoMAEForPreTraining without mean pooling, with "
        f"{architecture.depth} + {architecture.decoder_depth} blocks"
    )
    return from_transformers_state(state, blank, what)


def to_transformers(model: nn.Module) -> dict[str, Tensor]:
    """Return a state dict for transformers: of VideoMAEForPreTraining for a `VideoMAE` (`use_mean_pooling=False`),
    VideoMAEModel for a `VideoEncoder`, or VideoMAEForVideoClassification for a classifier.
    """
    return to_transformers_state(gather_weights(model))
