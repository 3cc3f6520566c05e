"""Sizes of models, their files, and the way to and from transformers' VideoMAE checkpoints."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor, nn

from stm.config import ModelSize, PretrainRun
from stm.files import write_bytes
from stm.models.vit import Architecture, VideoEncoder, VideoMAE

HEADER_KEY = "stm"


class Size(NamedTuple):
    """Widths, depths and heads of encoder and decoder."""

    width: int
    depth: int
    heads: int
    decoder_width: int
    decoder_depth: int
    decoder_heads: int


# VideoMAE's sizes (its modeling_pretrain.py), with the decoder depths of its pretraining scripts. `tiny` is
# ours, for the demo and for tests: a third of small, in both directions.
SIZES: Mapping[ModelSize, Size] = {
    "tiny": Size(128, 4, 4, 64, 2, 2),
    "small": Size(384, 12, 6, 192, 4, 3),
    "base": Size(768, 12, 12, 384, 4, 6),
    "large": Size(1024, 24, 16, 512, 12, 8),
    "huge": Size(1280, 32, 16, 640, 12, 8),
}


def describe(run: PretrainRun) -> Architecture:
    """The architecture that a run's config asks for."""
    size = SIZES[run.model]
    if run.decoder_depth is not None:
        size = size._replace(decoder_depth=run.decoder_depth)
    return Architecture(run.image_size, run.patch_size, run.tubelet, run.frames, **size._asdict())


def build(run: PretrainRun) -> VideoMAE:
    """A fresh model for a run; seed torch before for the same weights."""
    return VideoMAE(describe(run))


def count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# -------------------------------------------------------------------------------------------------------
# files


def save(model: VideoMAE, path: Path) -> None:
    """Writes weights (safetensors), atomically, with the architecture in the header: same weights, same bytes."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    # One entry: safetensors writes several in an order that differs from run to run.
    header = {"architecture": asdict(model.architecture)}
    write_bytes(path, serialise(tensors, {HEADER_KEY: json.dumps(header, sort_keys=True)}))


def load(path: Path, drop_path: float = 0.0) -> VideoMAE:
    """A model from the file that `save` wrote.

    Raises:
        ValueError: the file is missing, torn, or has no stm architecture; or its weights do not fit it.
    """
    tensors, header = _read(path)
    if "architecture" not in header:
        raise ValueError(f"{path} was not written by stm: its header says no architecture. Convert it first")
    try:
        architecture = Architecture(**header["architecture"])
    except TypeError as error:
        raise ValueError(f"{path} was written by another version of stm: {error}. Pretrain again") from error
    model = VideoMAE(architecture, drop_path)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{path}: the weights do not fit the architecture in the header: {error}") from error
    return model


def load_encoder(path: Path, drop_path: float = 0.0) -> VideoEncoder:
    """The encoder alone of the file that `save` wrote; errors as `load`."""
    return load(path, drop_path).encoder


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(HEADER_KEY, "{}"))
            return {name: file.get_tensor(name) for name in sorted(file.keys())}, header
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{path}: cannot be read as safetensors ({error})") from error


# ------------------------------------------------------------------------------------------- transformers'
# names

# Where a module of ours is in transformers' VideoMAEForPreTraining; {n} is a block's number.
_MODULES = {
    "encoder.embedding.projection": "videomae.embeddings.patch_embeddings.projection",
    "encoder.norm": "videomae.layernorm",
    "decoder.entry": "encoder_to_decoder",
    "decoder.norm": "decoder.norm",
    "decoder.head": "decoder.head",
}
_BLOCKS = {"encoder.blocks": "videomae.encoder.layer", "decoder.blocks": "decoder.decoder_layers"}
_IN_BLOCK = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


def _translate(architecture: Architecture) -> dict[str, str]:
    """Our parameter names to transformers', of all weights but the joint query-key-value layers'."""
    modules = dict(_MODULES)
    for (ours, theirs), depth in zip(_BLOCKS.items(), (architecture.depth, architecture.decoder_depth), strict=True):
        for block in range(depth):
            modules |= {f"{ours}.{block}.{a}": f"{theirs}.{block}.{b}" for a, b in _IN_BLOCK.items()}
    names = {f"{a}.{kind}": f"{b}.{kind}" for a, b in modules.items() for kind in ("weight", "bias")}
    del names["decoder.entry.bias"]
    return {**names, "decoder.mask_token": "mask_token"}


def _attentions(architecture: Architecture) -> list[tuple[str, str]]:
    """Prefixes of the joint query-key-value layers, ours and transformers'."""
    depths = (architecture.depth, architecture.decoder_depth)
    return [
        (f"{ours}.{block}.attn.qkv", f"{theirs}.{block}.attention.attention")
        for (ours, theirs), depth in zip(_BLOCKS.items(), depths, strict=True)
        for block in range(depth)
    ]


_EMBEDDING = "encoder.embedding.projection.weight"


def from_transformers(state: Mapping[str, Tensor], architecture: Architecture) -> dict[str, Tensor]:
    """A state dict of transformers' VideoMAEForPreTraining -> one of `VideoMAE`, exactly.

    The config must have had `use_mean_pooling=False`: with its default, True, transformers drops the
    encoder's last norm even in pretraining. Give `norm_eps=config.layer_norm_eps, decoder_norm_eps=1e-5` to
    the architecture.

    Raises:
        ValueError: a weight is missing; the message says which.
    """
    try:
        found = {ours: state[theirs] for ours, theirs in _translate(architecture).items()}
        for ours, theirs in _attentions(architecture):
            parts = [state[f"{theirs}.{part}.weight"] for part in ("query", "key", "value")]
            query, value = state[f"{theirs}.query.bias"], state[f"{theirs}.value.bias"]
            found[f"{ours}.weight"] = torch.cat(parts)
            found[f"{ours}.bias"] = torch.cat([query, torch.zeros_like(query), value])
    except KeyError as error:
        raise ValueError(
            f"the checkpoint has no weight {error}: not a VideoMAEForPreTraining without mean pooling and "
            f"{architecture.depth} + {architecture.decoder_depth} blocks?"
        ) from error
    found[_EMBEDDING] = found[_EMBEDDING].flatten(1)
    return found


def to_transformers(model: VideoMAE) -> dict[str, Tensor]:
    """The weights under the names of transformers' VideoMAEForPreTraining (`use_mean_pooling=False`).

    Its keys have no bias, and ours is left out: it adds the same number to all logits of a query, which
    softmax does not notice.
    """
    state, a = model.state_dict(), model.architecture
    found = {theirs: state[ours] for ours, theirs in _translate(a).items()}
    for ours, theirs in _attentions(a):
        weights, biases = state[f"{ours}.weight"].chunk(3), state[f"{ours}.bias"].chunk(3)
        found |= {f"{theirs}.{part}.weight": w for part, w in zip(("query", "key", "value"), weights, strict=True)}
        found |= {f"{theirs}.query.bias": biases[0], f"{theirs}.value.bias": biases[2]}
    kernel = (3, a.tubelet, a.patch_size, a.patch_size)
    found[_translate(a)[_EMBEDDING]] = state[_EMBEDDING].unflatten(1, kernel)
    return {name: tensor.contiguous() for name, tensor in found.items()}


def transformers_config(architecture: Architecture) -> dict[str, Any]:
    """Arguments for transformers' VideoMAEConfig under which it computes what `VideoMAE` does.

    But for the epsilon of the decoder's last norm, which transformers fixes at 1e-5 (see `decoder_norm_eps`).
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
        "use_mean_pooling": False,
    }
