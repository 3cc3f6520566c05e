"""Models by name, and the one entry point for weights: any source in, any format out.

`safetensors`, `videomae` and `transformers` handle one format each; `timm` makes timm models.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

from torch import Tensor, nn

from stm.config import Run
from stm.models.sizes import SIZES, Size
from stm.models.vit import Architecture, VideoEncoder, VideoMAE
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


def describe(run: Run) -> Architecture:
    """The architecture that a run's config describes."""
    size = SIZES[run.model]
    if run.decoder_depth is not None:
        size = size._replace(decoder_depth=run.decoder_depth)
    return Architecture(
        run.image_size,
        run.patch_size,
        run.tubelet,
        run.frames,
        **size._asdict(),
        positions=run.positions,
        position_period=run.position_period,
        position_frames=run.position_table_frames,
    )


def build(run: Run) -> VideoMAE:
    """A fresh model for a run; seed torch first for reproducible weights."""
    return VideoMAE(describe(run))


def count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def load(path: Path, drop_path: float = 0.0) -> VideoMAE:
    """A model from the file that `save` wrote.

    Raises:
        WeightsError: the file is missing, damaged, has no stm architecture or no decoder, or its weights do not fit.
    """
    model = build_module(read_own(path), drop_path)
    if not isinstance(model, VideoMAE):
        raise WeightsError(f"{path} has an encoder and no decoder: `load_encoder` reads it")
    return model


# -------------------------------------------------------------------------------------------------------
# any source


def read(source: str | Path, architecture: Architecture | None = None, encoder_only: bool = False) -> Weights:
    """Weights under our names, from any known source.

    Args:
        source: our safetensors file; a VideoMAE `.pth`; a transformers folder; a folder with our
            `weights.safetensors`. A string that is not a path on this machine may be a repository of the hub
            (`owner/name`), which transformers then fetches.
        architecture: of the model that the weights are for. Its clip length and image size may differ from the
            source's; all that the weights determine must agree. Needed only for a `.pth` of a width that none of
            VideoMAE's sizes has.
        encoder_only: without the decoder or head; then the decoders may differ.

    Raises:
        WeightsError: the source cannot be read, or does not fit; the message says what it is.
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
    """Recognises a file by its first bytes, since suffixes are unreliable: safetensors starts with a length and a brace."""
    with path.open("rb") as file:
        start = file.read(9)
    if start[8:9] == b"{" or path.suffix == ".safetensors":
        return read_own(path)
    if start.startswith((b"PK\x03\x04", b"\x80")):  # torch's zip, and its older plain pickle
        return read_official(path, architecture)
    raise WeightsError(f"{path}: neither safetensors nor a torch checkpoint (.pth)")


def load_any(
    source: str | Path, architecture: Architecture | None = None, drop_path: float = 0.0
) -> VideoMAE | VideoEncoder:
    """A model from any source (see `read`): a `VideoMAE`, or a `VideoEncoder` if the weights have no decoder."""
    return build_module(read(source, architecture), drop_path)


def load_encoder(source: str | Path, drop_path: float = 0.0, architecture: Architecture | None = None) -> VideoEncoder:
    """The encoder alone, from any source (see `read`), without the decoder, whatever its shape."""
    return build_encoder(read(source, architecture, encoder_only=True), drop_path)


def convert(
    source: str | Path,
    target: str | Path,
    format: Format,
    architecture: Architecture | None = None,
    encoder_only: bool = False,
) -> Path:
    """Writes the weights of any source (see `read`) in another format.

    Args:
        source: what `read` takes.
        target: a file; for transformers a folder.
        format: "stm", "official" (VideoMAE's `.pth`) or "transformers".
        architecture: as in `read`; the target is written for it.
        encoder_only: without the decoder or the classifier's head; transformers then has a `VideoMAEModel`.

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
    """A state dict of transformers' VideoMAEForPreTraining -> one of `VideoMAE`, exactly.

    The config must have had `use_mean_pooling=False`: with its default, True, transformers drops the encoder's last
    norm even in pretraining. Give `norm_eps=config.layer_norm_eps, decoder_norm_eps=1e-5` to the architecture.

    Raises:
        WeightsError: weights are missing, not expected, or of the wrong shape.
    """
    blank = Weights(architecture, outline(architecture, "pretraining"))
    what = (
        "this is read as a VideoMAEForPreTraining without mean pooling, with "
        f"{architecture.depth} + {architecture.decoder_depth} blocks"
    )
    return from_transformers_state(state, blank, what)


def to_transformers(model: nn.Module) -> dict[str, Tensor]:
    """The weights under transformers' names: of VideoMAEForPreTraining for a `VideoMAE` (`use_mean_pooling=False`),
    VideoMAEModel for a `VideoEncoder`, VideoMAEForVideoClassification for a classifier.
    """
    return to_transformers_state(gather_weights(model))
