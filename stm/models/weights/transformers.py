"""Reads and writes transformers folders (`config.json`, `model.safetensors`) of the three VideoMAE models.

`VideoMAEForPreTraining` and `VideoMAEModel` have the encoder's final norm only with `use_mean_pooling=False`;
`VideoMAEForVideoClassification` with True is VideoMAE's fine-tuned model. Keys have no bias. Two epsilons are
hard-coded to 1e-5, where VideoMAE has 1e-6: those of the decoder's final norm and of `fc_norm`.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as serialise
from torch import Tensor

from stm.models.vit import Architecture
from stm.models.weights.checks import (
    Kind,
    Weights,
    WeightsError,
    check_positions,
    check_tensors,
    outline,
    parse_architecture,
    raise_differences,
)
from stm.pretrained.hub import ModelSource, explain_missing
from stm.storage.files import read_json, write_bytes, write_json
from stm.tubelets import IMAGENET_MEAN, IMAGENET_STD

CLASSES: Mapping[Kind, str] = {
    "pretraining": "VideoMAEForPreTraining",
    "encoder": "VideoMAEModel",
    "classifier": "VideoMAEForVideoClassification",
}
EMBEDDING = "embeddings.patch_embeddings.projection.weight"
_BILINEAR = 2  # PIL.Image.Resampling.BILINEAR
FIXED_EPS = 1e-5  # hard-coded in transformers' VideoMAEDecoder and VideoMAEForVideoClassification

# -------------------------------------------------------------------------------------------------------
# names

# The start of a name is replaced by the first matching pattern; in a block, its parts are then replaced as well.
_STARTS = {
    r"encoder\.embedding\.projection": "videomae.embeddings.patch_embeddings.projection",
    r"encoder\.norm": "videomae.layernorm",
    r"encoder\.blocks": "videomae.encoder.layer",
    r"decoder\.blocks": "decoder.decoder_layers",
    r"decoder\.entry": "encoder_to_decoder",
    r"decoder\.mask_token": "mask_token",
    r"head": "classifier",
}
_IN_BLOCK = {
    r"\bnorm1\b": "layernorm_before",
    r"\bnorm2\b": "layernorm_after",
    r"\battn\.proj\b": "attention.output.dense",
    r"\battn\.qkv\b": "attention.attention.qkv",  # split in three by transformers
    r"\bmlp\.fc1\b": "intermediate.dense",
    r"\bmlp\.fc2\b": "output.dense",
}
_PARTS = ("query", "key", "value")


def _name(ours: str, kind: Kind) -> str:
    """Map one of our tensor names to transformers' state dict."""
    name = ours
    for pattern, theirs in _STARTS.items():
        if re.match(rf"{pattern}(\.|$)", name):
            name = re.sub(f"^{pattern}", theirs, name)
            break
    if ".blocks." in ours:
        for pattern, theirs in _IN_BLOCK.items():
            name = re.sub(pattern, theirs, name)
    return name.removeprefix("videomae.") if kind == "encoder" else name


def to_transformers_state(weights: Weights) -> dict[str, Tensor]:
    """Convert weights to a state dict with transformers' names.

    Its keys have no bias, and ours is dropped: it adds a constant to all logits of a query, which cancels in the softmax.
    The encoder's final norm is dropped for classifiers, which do not use it.
    """
    a, kind = weights.architecture, weights.kind
    check_positions(a, "transformers")
    renamed: dict[str, Tensor] = {}
    for ours, tensor in weights.tensors.items():
        theirs = _name(ours, kind)
        if ".qkv." in theirs:
            parts = zip(_PARTS, tensor.chunk(3), strict=True)
            renamed |= {theirs.replace("qkv", part): t for part, t in parts if f"{part}{tensor.dim()}" != "key1"}
        elif theirs.endswith(EMBEDDING):
            renamed[theirs] = tensor.unflatten(1, (3, a.tubelet, a.patch_size, a.patch_size))
        elif kind != "classifier" or not ours.startswith("encoder.norm."):
            renamed[theirs] = tensor
    return {name: tensor.contiguous() for name, tensor in renamed.items()}


def from_transformers_state(state: Mapping[str, Tensor], blank: Weights, what: str) -> dict[str, Tensor]:
    """Invert `to_transformers_state`; `blank` defines our names and shapes.

    Raises:
        WeightsError: weights are missing, unexpected, or of the wrong shape; the message starts with `what`.
    """
    check_tensors(state, to_transformers_state(blank), what)
    tensors = {}
    for ours, shaped in blank.tensors.items():
        theirs = _name(ours, blank.kind)
        if ours.endswith("qkv.weight"):
            tensors[ours] = torch.cat([state[theirs.replace("qkv", part)] for part in _PARTS])
        elif ours.endswith("qkv.bias"):
            query, value = (state[theirs.replace("qkv", part)] for part in ("query", "value"))
            tensors[ours] = torch.cat([query, torch.zeros_like(query), value])
        elif theirs in state:
            tensors[ours] = state[theirs].reshape(shaped.shape)
        else:  # the final norm, absent in a classifier
            tensors[ours] = (torch.ones if ours.endswith("weight") else torch.zeros)(shaped.shape)
    return tensors


# -------------------------------------------------------------------------------------------------------
# configs


def transformers_config(architecture: Architecture, kind: Kind = "pretraining") -> dict[str, Any]:
    """Arguments for transformers' VideoMAEConfig under which its model is equivalent to ours.

    The exceptions are the two epsilons that its code hard-codes to 1e-5 (see above).
    """
    a = architecture
    return {
        "image_size": a.image_size,
        "patch_size": a.patch_size,
        "num_frames": a.frames,
        "tubelet_size": a.tubelet,
        "hidden_size": a.width,
        "num_hidden_layers": a.depth,
        "num_attention_heads": a.heads,
        "intermediate_size": int(a.width * a.mlp_ratio),
        "decoder_hidden_size": a.decoder_width,
        "decoder_num_hidden_layers": a.decoder_depth,
        "decoder_num_attention_heads": a.decoder_heads,
        "decoder_intermediate_size": int(a.decoder_width * a.mlp_ratio),
        "layer_norm_eps": a.norm_eps,
        "use_mean_pooling": kind == "classifier",
    }


def _parse_config(config: Any, what: str) -> tuple[Architecture, Kind]:
    """Parse architecture and kind from a VideoMAEConfig, which must describe a model equivalent to ours."""
    named = (config.architectures or ["no model"])[0]
    kinds = [kind for kind, name in CLASSES.items() if name == named]
    if not kinds:
        raise WeightsError(f"{what}, but a {named}; stm reads {', '.join(CLASSES.values())}")
    (kind,) = kinds
    # These are built into our model; a config with different values describes a different network.
    expected = {"num_channels": 3, "hidden_act": "gelu", "qv_bias": True}
    expected["use_mean_pooling"] = kind == "classifier"
    other = [
        f"{key} {getattr(config, key)} instead of {value}"
        for key, value in expected.items()
        if getattr(config, key) != value
    ]
    if other:
        raise WeightsError(f"{what} ({named}), but its config describes another network than ours: {', '.join(other)}")
    values = {
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "frames": config.num_frames,
        "tubelet": config.tubelet_size,
        "width": config.hidden_size,
        "depth": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "decoder_width": config.decoder_hidden_size,
        "decoder_depth": config.decoder_num_hidden_layers,
        "decoder_heads": config.decoder_num_attention_heads,
        "mlp_ratio": config.intermediate_size / config.hidden_size,
        "norm_eps": config.layer_norm_eps,
        "decoder_norm_eps": FIXED_EPS,
    }
    return parse_architecture(values, what), kind


def _preprocessor(a: Architecture) -> dict[str, Any]:
    """Settings of transformers' processors with our test crop and normalisation.

    Frames whose shorter side is `image_size` give our pixels exactly. Others are resized: by an antialiased linear filter
    there, by area averaging here.
    """
    return {
        "do_resize": True,
        "resample": _BILINEAR,
        "size": {"shortest_edge": a.image_size},
        "do_center_crop": True,
        "crop_size": {"height": a.image_size, "width": a.image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(IMAGENET_MEAN),
        "image_std": list(IMAGENET_STD),
    }


# -------------------------------------------------------------------------------------------------------
# folders


def write_transformers(weights: Weights, folder: Path) -> list[str]:
    """Write a folder for `from_pretrained` of `CLASSES[weights.kind]`, deterministically; returns notes on what differs."""
    if folder.exists() and not folder.is_dir():
        raise WeightsError(f"{folder}: is a file; transformers' format is a folder")
    config = transformers_config(weights.architecture, weights.kind)
    # The names that transformers 4 expects; transformers 5 also saves these and renames them on loading.
    state = {
        name.replace("query.bias", "q_bias").replace("value.bias", "v_bias"): tensor
        for name, tensor in to_transformers_state(weights).items()
    }
    precision = str(next(iter(state.values())).dtype).removeprefix("torch.")
    config |= {"model_type": "videomae", "architectures": [CLASSES[weights.kind]], "dtype": precision}
    if weights.kind == "classifier":
        labels = weights.labels or tuple(f"LABEL_{number}" for number in range(weights.classes))
        config["id2label"] = {str(number): label for number, label in enumerate(labels)}
        config["label2id"] = {label: number for number, label in enumerate(labels)}
    write_bytes(folder / "model.safetensors", serialise(state, {"format": "pt"}))
    # One file for AutoImageProcessor, one for AutoVideoProcessor, which only falls back on the first in some versions.
    processor = _preprocessor(weights.architecture)
    image = {"image_processor_type": "VideoMAEImageProcessor"}
    video = {
        "video_processor_type": "VideoMAEVideoProcessor",
        "do_convert_rgb": True,
        "do_sample_frames": False,  # clips; with `do_sample_frames=True`, whole videos
        "num_frames": weights.architecture.frames,
    }
    write_json(folder / "preprocessor_config.json", processor | image)
    write_json(folder / "video_preprocessor_config.json", processor | video)
    write_json(folder / "config.json", config)
    return _describe_epsilon(weights)


def _describe_epsilon(weights: Weights) -> list[str]:
    """A note on the norm whose epsilon transformers' code fixes, unless it is the same."""
    a = weights.architecture
    name, ours = {"classifier": ("fc_norm", a.norm_eps), "pretraining": ("decoder.norm", a.decoder_norm_eps)}.get(
        weights.kind, ("", FIXED_EPS)
    )
    if ours == FIXED_EPS:
        return []
    return [
        f"`{name}` has an epsilon of {FIXED_EPS:g} in transformers instead of {ours:g}: outputs differ by about half of that, "
        f"relative to the variance of what it normalises; `model.{name}.eps = {ours:g}` makes them equal"
    ]


def read_transformers(source: ModelSource) -> Weights:
    """Read a folder or a hub repository with transformers, in float32.

    Raises:
        WeightsError: it cannot be loaded, is not a VideoMAE, or is not equivalent to our model; or transformers is not installed.
    """
    try:
        import transformers
    except ModuleNotFoundError as error:
        # Any name that is not a local path is one of the hub, also a mistyped one.
        unknown = "" if source.folder else "there is no such file or folder, and "
        raise WeightsError(
            f"{source.name}: {unknown}models of transformers need the library {error.name}: pip install 'stm-video[language]'"
        ) from error

    what = f"{source.name} is a transformers VideoMAE"
    try:
        config = transformers.AutoConfig.from_pretrained(**source.arguments)
        if config.model_type != "videomae":
            raise WeightsError(f"{source.name} is a transformers model of type {config.model_type}, not videomae")
        architecture, kind = _parse_config(config, what)
        _check_shards(source)
        # With its class, which supports older weight names, sharded files, and `.bin` files.
        model, report = getattr(transformers, CLASSES[kind]).from_pretrained(
            **source.arguments,
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in the report, and an error is raised below
        )
    except WeightsError:
        raise
    except Exception as error:  # five libraries raise their own exception types for damaged files and invalid configs
        raise WeightsError(str(explain_missing(source, error))) from error
    _check_report(report, what)
    state = model.state_dict()
    labels = tuple(config.id2label[number] for number in range(config.num_labels)) if kind == "classifier" else None
    blank = Weights(architecture, outline(architecture, kind, config.num_labels if kind == "classifier" else 0))
    return Weights(architecture, from_transformers_state(state, blank, what), labels)


def _check_shards(source: ModelSource) -> None:
    """Raise WeightsError if the index of a folder's sharded weights names files outside of the folder."""
    for path in sorted(source.folder.glob("*.index.json")) if source.folder is not None else ():
        content = read_json(path)
        shards = content.get("weight_map") if isinstance(content, dict) else None
        names = shards.values() if isinstance(shards, dict) else ()
        outside = [name for name in names if not isinstance(name, str) or Path(name).name != name]
        if outside:
            raise WeightsError(f"{path}: names {outside[0]!r}, which is not a file of this folder")


def _check_report(report: Mapping[str, Any], what: str) -> None:
    """Raise WeightsError for incomplete files, since transformers only warns about missing weights and leaves them random."""
    raise_differences(
        {
            "missing": sorted(report["missing_keys"]),
            "not expected": sorted(report["unexpected_keys"]),
            "of the wrong shape": sorted(str(entry) for entry in report["mismatched_keys"]),
        },
        what,
    )
