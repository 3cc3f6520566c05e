"""Exports a trained encoder to timm: as a model for clips, and as a folder that timm loads without stm.

timm's `VisionTransformer` is for images. A clip becomes one image (`stack_slots`): a tubelet's frames are stacked along the
channels and the time slots below each other, so that the tokens of a ViT over this image are the clip's, in the same order.
Its state dict, blocks and positions are therefore plain timm; only the input has to be rearranged, which `ClipTransformer`
does by itself. Position embeddings are a parameter, as in timm, so any table can be exported.
"""

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialise
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from stm.models.architecture import Architecture
from stm.models.vit import make_positions
from stm.models.weights.checks import (
    Kind,
    Weights,
    WeightsError,
    check_tensors,
    gather_weights,
    outline,
    parse_architecture,
    parse_labels,
)
from stm.storage.files import read_json, write_bytes, write_json
from stm.tubelets import IMAGENET_MEAN, IMAGENET_STD

NORM_EPS = 1e-6  # of timm's LayerNorm, which a folder's config cannot change
HEADER_KEY = "stm"
# timm's entry points by width. All of a model's sizes are given as arguments; these are only the closest names.
_ENTRY_POINTS = {
    384: "vit_small_patch16_224",
    768: "vit_base_patch16_224",
    1024: "vit_large_patch16_224",
    1280: "vit_huge_patch14_224",
}
_OTHER_ENTRY_POINT = "vit_tiny_patch16_224"


def stack_slots(clip: Tensor, tubelet: int) -> Tensor:
    """Rearrange clips [B, 3, T, S, S] as images [B, 3 * tubelet, T / tubelet * S, S]."""
    slots = clip.unflatten(2, (-1, tubelet))  # [B, 3, slots, tubelet, S, S]
    return slots.transpose(2, 3).flatten(3, 4).flatten(1, 2)


class ClipTransformer(VisionTransformer):
    """timm's `VisionTransformer` for normalised clips, float [B, 3, T, S, S] (channels first, as in timm).

    `forward_features` returns tokens [B, L, width]; `forward_intermediates` returns blocks' outputs as [B, width, slots, rows,
    columns], or as tokens with `output_fmt="NLC"`.
    """

    pretrained_cfg: dict[str, Any]  # as timm's factory sets them
    default_cfg: dict[str, Any]
    _model_args: dict[str, Any]

    def __init__(self, frames: int, tubelet: int, image_size: int, **arguments: Any) -> None:
        """
        Args:
            frames, tubelet, image_size: size of the clips; image_size in pixels.
            arguments: those of `VisionTransformer`, for the images of `stack_slots`.
        """
        super().__init__(**arguments)
        self.clip_shape = (3, frames, image_size, image_size)
        self.tubelet = tubelet

    def forward_features(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward_features(self._stack(x), *args, **kwargs)

    def forward_intermediates(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self._split_slots(super().forward_intermediates(self._stack(x), *args, **kwargs))

    def _stack(self, clip: Tensor) -> Tensor:
        if tuple(clip.shape[1:]) != self.clip_shape:
            raise ValueError(f"clips must be [B, {', '.join(map(str, self.clip_shape))}], not {list(clip.shape)}")
        return stack_slots(clip, self.tubelet)

    def _split_slots(self, outputs: Any) -> Any:
        """Maps [B, width, slots * rows, columns] in timm's nested outputs are split into slots; tokens stay as they are."""
        if isinstance(outputs, Tensor):
            slots = self.clip_shape[1] // self.tubelet
            return outputs.unflatten(2, (slots, -1)) if outputs.dim() == 4 else outputs
        if isinstance(outputs, dict):
            return {name: self._split_slots(output) for name, output in outputs.items()}
        return type(outputs)(self._split_slots(output) for output in outputs)


# -------------------------------------------------------------------------------------------------------
# tensors


def to_timm_state(weights: Weights) -> dict[str, Tensor]:
    """The state dict for timm's model, without the decoder.

    For a classifier, `fc_norm` replaces the final norm of the tokens.
    """
    a = weights.architecture
    state = {"pos_embed": make_positions(a, a.width)}
    for ours, tensor in weights.tensors.items():
        theirs = _name(ours, weights.kind)
        if theirs is None:
            continue
        if theirs == "patch_embed.proj.weight":
            tensor = tensor.unflatten(1, (3 * a.tubelet, a.patch_size, a.patch_size))  # ordered colour, frame
        state[theirs] = tensor
    return state


def _name(ours: str, kind: Kind) -> str | None:
    """Map one of our tensor names to timm's; None for those that timm's model does not have."""
    if ours.startswith("decoder.") or (kind == "classifier" and ours.startswith("encoder.norm.")):
        return None
    return ours.removeprefix("encoder.").replace("embedding.projection.", "patch_embed.proj.")


def _from_timm_state(state: Mapping[str, Tensor], blank: Weights, what: str) -> dict[str, Tensor]:
    """Invert `to_timm_state`; `blank` defines our names and shapes."""
    expected = to_timm_state(blank)
    check_tensors(state, expected, what)
    if not torch.allclose(state["pos_embed"].float(), expected["pos_embed"], atol=1e-5):
        raise WeightsError(f"{what}, but its position embeddings were trained, and stm's are a fixed table")
    tensors = {}
    for ours, shaped in blank.tensors.items():
        theirs = _name(ours, blank.kind)
        if theirs is not None:
            tensors[ours] = state[theirs].reshape(shaped.shape)
        else:  # the final norm, absent in a classifier
            tensors[ours] = (torch.ones if ours.endswith("weight") else torch.zeros)(shaped.shape)
    return tensors


# -------------------------------------------------------------------------------------------------------
# configs


def timm_arguments(a: Architecture, kind: Kind, classes: int) -> dict[str, Any]:
    """Arguments of timm's `VisionTransformer` for the images of `stack_slots`, as JSON values."""
    return {
        "img_size": [a.slots * a.image_size, a.image_size],
        "patch_size": a.patch_size,
        "in_chans": 3 * a.tubelet,
        "embed_dim": a.width,
        "depth": a.depth,
        "num_heads": a.heads,
        "mlp_ratio": a.mlp_ratio,
        "num_classes": classes,
        "class_token": False,
        "global_pool": "avg",
        "fc_norm": kind == "classifier",
    }


def pretrained_cfg(weights: Weights, license: str | None = None) -> dict[str, Any]:
    """timm's `pretrained_cfg` of such a model: the input, its preprocessing, and the licence.

    The channels of `mean` and `std` are those of the stacked image: each colour's value once per frame of a tubelet.
    """
    a = weights.architecture
    cfg: dict[str, Any] = {
        "input_size": [3 * a.tubelet, a.slots * a.image_size, a.image_size],
        "fixed_input_size": True,
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "crop_mode": "center",
        "mean": [value for value in IMAGENET_MEAN for _ in range(a.tubelet)],
        "std": [value for value in IMAGENET_STD for _ in range(a.tubelet)],
        "num_classes": weights.classes,
        "pool_size": None,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "description": (
            f"clips of {a.frames} frames of {a.image_size} x {a.image_size} pixels, stacked as an image: tubelets of {a.tubelet} "
            f"frames along the channels, {a.slots} time slots along the height"
        ),
    }
    if license is not None:
        cfg["license"] = license
    if weights.labels:
        cfg["label_names"] = list(weights.labels)
    return cfg


def _entry_point(a: Architecture) -> str:
    return _ENTRY_POINTS.get(a.width, _OTHER_ENTRY_POINT)


# -------------------------------------------------------------------------------------------------------
# models and folders


def to_timm(model: nn.Module | Weights) -> ClipTransformer:
    """Build a timm model with the weights of a `VideoEncoder`, a `VideoMAE`, or a classifier around an encoder.

    `forward_features` returns the tokens [B, L, width], like our encoder; `model(clip)` returns their mean [B, width], or a
    classifier's logits [B, classes]. The position embedding is a frozen parameter.
    """
    weights = model if isinstance(model, Weights) else gather_weights(model)
    a = weights.architecture
    arguments = timm_arguments(a, weights.kind, weights.classes)
    norm = partial(nn.LayerNorm, eps=a.norm_eps)
    vit = ClipTransformer(a.frames, a.tubelet, a.image_size, weight_init="skip", norm_layer=norm, **arguments)
    vit.load_state_dict(to_timm_state(weights))
    vit.get_parameter("pos_embed").requires_grad_(False)
    vit._model_args = arguments  # timm's `save_for_hf` and `push_to_hf_hub` write them
    vit.pretrained_cfg = vit.default_cfg = {"architecture": _entry_point(a), **pretrained_cfg(weights)}
    return vit.eval()


def write_timm(weights: Weights, folder: Path, license: str | None = None) -> list[str]:
    """Write a folder for `timm.create_model("local-dir:...")`, deterministically; returns notes on what differs."""
    a = weights.architecture
    arguments = timm_arguments(a, weights.kind, weights.classes)
    del arguments["num_classes"]  # timm takes it from below; transformers' wrapper of timm would give it twice
    config: dict[str, Any] = {
        "architecture": _entry_point(a),
        "num_classes": weights.classes,
        "num_features": a.width,
        "global_pool": "avg",
        "model_args": arguments,
        "pretrained_cfg": pretrained_cfg(weights, license),
        HEADER_KEY: {"architecture": asdict(a)},  # ignored by timm; `read_timm` needs it
    }
    if weights.labels:
        config["label_names"] = list(weights.labels)
    state = {name: tensor.contiguous() for name, tensor in to_timm_state(weights).items()}
    write_bytes(folder / "model.safetensors", serialise(state, {"format": "pt"}))
    write_json(folder / "config.json", config)
    if a.norm_eps == NORM_EPS:
        return []
    return [
        f"norms have an epsilon of {NORM_EPS:g} in timm instead of {a.norm_eps:g}: outputs differ by about that much"
    ]


def read_timm(folder: Path, config: Mapping[str, Any]) -> Weights:
    """Read a folder of `write_timm`.

    Args:
        config: the content of its `config.json`.

    Raises:
        WeightsError: it was not written by stm or is damaged, or its positions are not the architecture's table.
    """
    what = f"{folder} is a timm folder"
    header = config.get(HEADER_KEY)
    if not isinstance(header, dict):
        raise WeightsError(f"{what}, but not one that stm wrote: only those are read")
    architecture = parse_architecture(header.get("architecture"), str(folder))
    try:
        state = load_file(folder / "model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise WeightsError(f"{folder / 'model.safetensors'}: cannot be read as safetensors ({error})") from error
    head = state.get("head.weight")
    classes = len(head) if head is not None and head.dim() else 0
    kind: Kind = "encoder" if head is None else "classifier"
    blank = Weights(architecture, outline(architecture, kind, classes))
    labels = parse_labels(config.get("label_names"), classes, str(folder))
    return Weights(architecture, _from_timm_state(state, blank, what), labels)


def read_timm_config(folder: Path) -> Mapping[str, Any] | None:
    """The content of a folder's `config.json` if it is in timm's format; None if it is not, or cannot be read."""
    if not (folder / "config.json").is_file():
        return None
    try:
        config = read_json(folder / "config.json")
    except (ValueError, RecursionError):
        return None
    return config if isinstance(config, dict) and "pretrained_cfg" in config else None
