"""Reads and writes VideoMAE's own checkpoints (`.pth`), both pretrained and fine-tuned.

The format is a dictionary with the state dict under "model" or, if written by DeepSpeed, "module". A pretraining
state has "encoder.*", "decoder.*", "encoder_to_decoder.weight" and "mask_token"; a fine-tuned one has the encoder
without a prefix, "fc_norm.*" and "head.*", but no "norm.*", because the mean is normalised instead of the tokens.
Queries, keys and values share one matrix; queries and values have separate biases, keys have none. Positions are a
fixed table and not stored. The decoder's outputs are ordered frame, row, column, colour, like ours.
"""

import argparse
import io
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from stm.models.sizes import heads_of_width, size_of_width
from stm.models.vit import Architecture, position_table
from stm.models.weights.checks import (
    Kind,
    Weights,
    WeightsError,
    check_positions,
    check_tensors,
    outline,
    parse_architecture,
    parse_labels,
)
from stm.storage.files import write_bytes

HEADER_KEY = "stm"
CHECKPOINT_NAME = "checkpoint.pth"  # in a folder with a model card
EMBEDDING = "patch_embed.proj.weight"

# -------------------------------------------------------------------------------------------------------
# names


def _name(ours: str, prefix: str) -> str:
    """Map one of our tensor names to the official state dict; `prefix` is that of the official encoder."""
    for start, theirs in (
        ("encoder.embedding.projection.", f"{prefix}patch_embed.proj."),
        ("encoder.", prefix),
        ("decoder.entry.", "encoder_to_decoder."),
        ("decoder.mask_token", "mask_token"),
    ):
        if ours.startswith(start):
            return theirs + ours.removeprefix(start)
    return ours


def _prefix(kind: Kind) -> str:
    return "" if kind == "classifier" else "encoder."


def to_official(weights: Weights) -> dict[str, Tensor]:
    """Convert weights to a state dict with the names of VideoMAE's code.

    It omits the keys' biases, which have no effect (they add a constant to all logits of a query), and a classifier's
    final encoder norm, which is not used.
    """
    a, kind = weights.architecture, weights.kind
    check_positions(a, "VideoMAE's code")
    official: dict[str, Tensor] = {}
    for ours, tensor in weights.tensors.items():
        theirs = _name(ours, _prefix(kind))
        if ours.endswith("attn.qkv.bias"):
            query, _, value = tensor.chunk(3)
            official |= {theirs.replace("qkv.bias", "q_bias"): query, theirs.replace("qkv.bias", "v_bias"): value}
        elif theirs.endswith(EMBEDDING):
            official[theirs] = tensor.unflatten(1, (3, a.tubelet, a.patch_size, a.patch_size))
        elif kind != "classifier" or not ours.startswith("encoder.norm."):
            official[theirs] = tensor
    # Cloned, because torch.save would store the whole joint bias for each of its slices.
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in official.items()}


def _from_official(state: Mapping[str, Tensor], blank: Weights) -> dict[str, Tensor]:
    """Invert `to_official`, in float32; `blank` defines our names. A classifier's missing norm is newly initialised."""
    tensors = {}
    for ours, shaped in blank.tensors.items():
        theirs = _name(ours, _prefix(blank.kind))
        if ours.endswith("attn.qkv.bias"):
            query, value = (state[theirs.replace("qkv.bias", part)].float() for part in ("q_bias", "v_bias"))
            tensors[ours] = torch.cat([query, torch.zeros_like(query), value])
        elif theirs in state:
            tensors[ours] = state[theirs].float().reshape(shaped.shape)
        else:
            tensors[ours] = (torch.ones if ours.endswith("weight") else torch.zeros)(shaped.shape)
    return tensors


# -------------------------------------------------------------------------------------------------------
# files


def write_official(weights: Weights, path: Path) -> None:
    """Write a `.pth` that VideoMAE's scripts can load, atomically and deterministically.

    In addition to "model", an entry "stm" contains what the format lacks: number of heads, clip length and image size.
    VideoMAE's scripts ignore it.
    """
    header: dict[str, Any] = {"architecture": asdict(weights.architecture)}
    if weights.labels:
        header["labels"] = list(weights.labels)
    buffer = io.BytesIO()  # torch.save would write a file's name into its content
    torch.save({"model": to_official(weights), HEADER_KEY: header}, buffer)
    write_bytes(path, buffer.getvalue())


def read_official(path: Path, architecture: Architecture | None = None) -> Weights:
    """Read a VideoMAE `.pth`, in float32.

    Widths, depths and patch sizes are inferred from the shapes. The number of heads is that of VideoMAE's size of that width;
    the clip length and image size come from the file's training arguments and default to 16 and 224. `architecture`
    supplies what the shapes do not determine; it is not compared with them here.

    Raises:
        WeightsError: the file is of a different kind, damaged or not safe to load, or its weights do not match.
    """
    return parse_checkpoint(load_checkpoint(path), path, architecture)


def parse_checkpoint(content: Mapping[str, Any], path: Path, architecture: Architecture | None = None) -> Weights:
    """Like `read_official`, but from a file's loaded content."""
    state, kind = find_state(content)
    what = f"{path} is a VideoMAE checkpoint (.pth, {kind})"
    header = content.get(HEADER_KEY)
    if isinstance(header, dict):
        inferred, labels = parse_architecture(header.get("architecture"), str(path)), header.get("labels")
    else:
        inferred, labels = _infer(state, kind, content.get("args"), architecture, str(path)), None
    head = state.get("head.weight")
    classes = len(head) if isinstance(head, Tensor) and head.dim() else 0
    blank = Weights(inferred, outline(inferred, kind, classes))
    check_tensors(state, to_official(blank), what)
    return Weights(inferred, _from_official(state, blank), parse_labels(labels, classes, str(path)))


# The classes besides tensors that checkpoints may contain. Unpickling the first only sets attributes. The second is the
# dictionary in which UMT's code saves its settings, read as a standard one.
_ALLOWED: list[Any] = [argparse.Namespace, (OrderedDict, "utils.easydict.EasyDict")]


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Load a `.pth` file's content: tensors, numbers and strings, but nothing that could run code.

    Raises:
        WeightsError: it is missing or damaged, contains anything else, or is not a dictionary.
    """
    if not path.is_file():
        raise WeightsError(f"{path}: cannot be read: there is no such file (from the working directory {Path.cwd()})")
    try:
        # weights_only rejects every class except tensors and these, and runs no code.
        with torch.serialization.safe_globals(_ALLOWED):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile pickle can raise nearly anything
        raise WeightsError(f"{path}: cannot be loaded as a checkpoint: {_explain(str(error))}") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: holds a {type(content).__name__}, not a dictionary with the weights in it")
    return content


def _explain(error: str) -> str:
    """Keep torch's reason but drop its advice to load the file unsafely."""
    culprit = re.search(r"GLOBAL (\S+)", error)
    if culprit or "weights_only" in error:
        asked = f"({culprit[1]}) " if culprit else ""
        return (
            f"it holds more than weights {asked}and loading it could run code, so stm refuses to. If you trust it, load it "
            "where it was made and save its state dict alone"
        )
    return f"it is damaged or not a checkpoint ({error.splitlines()[0] if error else 'no reason given'})"


def find_state(content: Mapping[str, Any]) -> tuple[dict[str, Any], Kind]:
    """Find the state dict in a file's content, without fixed position tables, and its kind."""
    state = next((content[key] for key in ("model", "module") if isinstance(content.get(key), dict)), content)
    state = {str(name): tensor for name, tensor in state.items() if not _is_fixed_table(str(name), tensor)}
    if "encoder_to_decoder.weight" in state:
        return state, "pretraining"
    if "head.weight" in state:
        return state, "classifier"
    if EMBEDDING in state:
        state = {f"encoder.{name}": tensor for name, tensor in state.items()}
    return state, "encoder"


def _is_fixed_table(name: str, tensor: Any) -> bool:
    """Whether this is the fixed position table, which we recompute; learned position embeddings are rejected later."""
    if not name.endswith("pos_embed") or not isinstance(tensor, Tensor) or tensor.dim() != 3:
        return False
    return torch.allclose(tensor.float(), position_table(*tensor.shape[1:]), atol=1e-5)


# -------------------------------------------------------------------------------------------------------
# architecture


def _infer(state: Mapping[str, Any], kind: Kind, arguments: Any, given: Architecture | None, path: str) -> Architecture:
    """Infer the architecture from the shapes, and the rest from `given`, the training arguments or VideoMAE's sizes."""
    prefix = _prefix(kind)
    width, _, tubelet, patch, _ = _shape(state, prefix + EMBEDDING, 5, path)
    hidden, _ = _shape(state, f"{prefix}blocks.0.mlp.fc1.weight", 2, path)
    # Shapes do not determine the heads or, in an encoder's file, the decoder: use VideoMAE's size of this width.
    size = size_of_width(width)
    values = {
        "tubelet": tubelet,
        "patch_size": patch,
        "width": width,
        "depth": _count_blocks(state, f"{prefix}blocks."),
        "mlp_ratio": hidden / width,
        "heads": given.heads if given and given.width == width else _heads(width, "encoder", path),
        # An encoder's file has no information on a decoder: use that of VideoMAE's size of this width, if it exists.
        "decoder_width": size.decoder_width if size else 0,
        "decoder_depth": size.decoder_depth if size else 0,
        "decoder_heads": size.decoder_heads if size else 0,
    }
    if kind == "pretraining":
        inner, _ = _shape(state, "encoder_to_decoder.weight", 2, path)
        known = given.decoder_heads if given and given.decoder_width == inner else None
        values |= {
            "decoder_width": inner,
            "decoder_depth": _count_blocks(state, "decoder.blocks."),
            "decoder_heads": known or _heads(inner, "decoder", path),
        }
    frames = _number(arguments, "num_frames", 16) * _number(arguments, "num_segments", 1)  # segments are concatenated
    values["frames"] = given.frames if given else frames
    values["image_size"] = given.image_size if given else _number(arguments, "input_size", 224)
    return parse_architecture(values, path)


def _number(arguments: Any, name: str, default: int) -> int:
    value = getattr(arguments, name, default)
    return value if isinstance(value, int) else default


def _shape(state: Mapping[str, Any], name: str, dimensions: int, path: str) -> torch.Size:
    tensor = state.get(name)
    if isinstance(tensor, Tensor) and tensor.dim() == dimensions and tensor.numel():
        return tensor.shape
    listed = ", ".join(sorted(state)[:5]) or "nothing"
    raise WeightsError(
        f"{path}: is not a VideoMAE checkpoint: it has no {name} of {dimensions} dimensions, but {listed}, …"
    )


def _count_blocks(state: Mapping[str, Any], prefix: str) -> int:
    return len({name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix)})


def _heads(width: int, part: Literal["encoder", "decoder"], path: str) -> int:
    heads = heads_of_width(width, part == "decoder")
    if heads is None:
        raise WeightsError(
            f"{path}: its {part} is {width} wide, which is none of VideoMAE's sizes; the number of heads cannot be inferred: "
            "give the architecture"
        )
    return heads
