"""Our own format: safetensors with the architecture in the header, and optionally modules trained with the model."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor, nn

from stm.models.weights.checks import (
    Weights,
    WeightsError,
    check_tensors,
    gather_weights,
    outline,
    parse_architecture,
    parse_labels,
)
from stm.storage.files import write_bytes

HEADER_KEY = "stm"


def save(
    model: nn.Module,
    path: Path,
    labels: Iterable[str] | None = None,
    extra: Mapping[str, Mapping[str, Tensor]] | None = None,
    header: Mapping[str, Any] | None = None,
) -> None:
    """Write weights (safetensors) atomically and deterministically, with the architecture in the header.

    Args:
        model: a `VideoMAE`, a `VideoEncoder`, or a classifier around an encoder (see `stm.models.weights.checks`).
        path: the file to write.
        labels: a classifier's class names, in logit order.
        extra: state dicts, by name (such as "contrast"), of modules trained with the model; see `load_extra`.
        header: the values needed to build each of these modules, as JSON values.
    """
    write_own(gather_weights(model, labels), path, extra or {}, header or {})


def write_own(
    weights: Weights,
    path: Path,
    extra: Mapping[str, Mapping[str, Tensor]] = MappingProxyType({}),
    about: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Like `save`, but takes `Weights` instead of a module."""
    header: dict[str, Any] = {"architecture": asdict(weights.architecture)}
    if weights.labels:
        header["labels"] = weights.labels
    if extra:
        header["extra"] = {name: about.get(name, {}) for name in extra}
    tensors = {name: tensor.contiguous() for name, tensor in weights.tensors.items()}
    for part, state in extra.items():
        tensors |= {f"{part}.{name}": tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    header["sha256"] = _digest(header, tensors)
    # A single entry, because safetensors writes several in an order that varies between runs.
    write_bytes(path, serialise(tensors, {HEADER_KEY: json.dumps(header, sort_keys=True)}))


def _digest(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the header and the tensors' names, dtypes, shapes and bytes."""
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy(force=True).data)
    return digest.hexdigest()


def load_extra(path: Path, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Load the state dict of a module that was saved with the model, and its header entry.

    Raises:
        WeightsError: the file cannot be read, or does not contain the module.
    """
    tensors, header = _open(path)
    if name not in _extras(header):
        raise WeightsError(f"{path} holds no {name!r}: the run that wrote it had none")
    state = {n.removeprefix(f"{name}."): t for n, t in tensors.items() if n.startswith(f"{name}.")}
    return state, _extras(header)[name]


def read_extra_names(path: Path) -> tuple[str, ...]:
    """The names of the modules that were saved with the model; empty if the file is not stm's."""
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(HEADER_KEY, "{}"))
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise WeightsError(f"{path}: cannot be read as safetensors ({error})") from error
    return tuple(_extras(header)) if isinstance(header, dict) else ()


def _extras(header: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    extras = header.get("extra", {})
    return extras if isinstance(extras, dict) and all(isinstance(about, dict) for about in extras.values()) else {}


def _open(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return all tensors of a safetensors file and our part of its header (empty if there is none)."""
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(HEADER_KEY, "{}"))
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise WeightsError(f"{path}: cannot be read as safetensors ({error})") from error
    header = header if isinstance(header, dict) else {}
    stated = header.pop("sha256", None)  # absent from files of older versions
    if stated is not None and stated != _digest(header, tensors):
        raise WeightsError(f"{path}: is damaged: its SHA-256 is not the one in its header. Copy or create it again")
    return tensors, header


def read_own(path: Path) -> Weights:
    """Read the model's weights, without the modules that were saved with it.

    Raises:
        WeightsError: the file is missing, damaged or not written by stm, or its weights do not match its header.
    """
    tensors, header = _open(path)
    if "architecture" not in header:
        raise WeightsError(
            f"{path} was not written by stm: its header has no architecture. For a transformers model give the folder"
        )
    extra = tuple(f"{name}." for name in _extras(header))
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(extra)}
    weights = Weights(parse_architecture(header["architecture"], str(path)), tensors)
    blank = outline(weights.architecture, weights.kind, weights.classes)
    check_tensors(tensors, blank, f"{path} was written by stm ({weights.kind})")
    return replace(weights, labels=parse_labels(header.get("labels"), weights.classes, str(path)))
