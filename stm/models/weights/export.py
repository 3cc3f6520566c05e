"""Writes weights in a format of one's choice: a folder with a model card, ready for the hub, or a single file."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from stm.models.weights.card import UNKNOWN, Format, write_card
from stm.models.weights.checks import Weights, WeightsError
from stm.models.weights.provenance import OWN_NAME, Provenance, find_provenance, own_file
from stm.models.weights.safetensors import load_extra, read_extra_names, write_own
from stm.models.weights.timm import write_timm
from stm.models.weights.transformers import write_transformers
from stm.models.weights.videomae import CHECKPOINT_NAME, write_official
from stm.storage.files import write_bytes, write_json

# Former names of formats, accepted for one version.
RENAMED = {"official": "videomae"}
_FILE_SUFFIXES = {"stm": (".safetensors",), "videomae": (".pth", ".pt")}
# What each format's folder contains.
FILES: Mapping[Format, frozenset[str]] = {
    "stm": frozenset({OWN_NAME, "config.json", "README.md"}),
    "videomae": frozenset({CHECKPOINT_NAME, "README.md"}),
    "timm": frozenset({"model.safetensors", "config.json", "README.md"}),
    "transformers": frozenset(
        {"model.safetensors", "config.json", "preprocessor_config.json", "video_preprocessor_config.json", "README.md"}
    ),
}
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")


class Extras(NamedTuple):
    """Modules that were saved with a model, as in `stm.models.weights.safetensors.save`."""

    states: Mapping[str, Mapping[str, Tensor]]
    header: Mapping[str, Any]


def check_format(format: str) -> Format:
    """Return a format's present name.

    Raises:
        WeightsError: there is no such format.
    """
    name = RENAMED.get(format, format)
    for known in get_args(Format):
        if name == known:
            return known
    raise WeightsError(f"unknown format {format!r}; there are: {', '.join(get_args(Format))}")


def export(
    weights: Weights,
    source: str | Path,
    target: Path,
    format: Format,
    encoder_only: bool = False,
    license: str = UNKNOWN,
) -> list[str]:
    """Write weights to a folder with a model card; for stm and videomae, to a file if the target has their suffix.

    Args:
        weights: read from `source`, without decoder or head if `encoder_only`.
        source: what lies beside it describes the weights in the card.
        license: the weights' licence as the hub abbreviates it, such as `apache-2.0`, for the card.

    Returns:
        Notes on what was left out or changed, as sentences without a full stop.

    Raises:
        WeightsError: the format cannot represent the weights.
    """
    if not _LICENSE.fullmatch(license):
        raise WeightsError(f"license {license!r}: give the hub's abbreviation, such as apache-2.0 or cc-by-nc-4.0")
    weights = _own_tensors(weights)
    extras, notes = _keep_extras(weights, source, format, encoder_only)
    if format == "timm" and weights.kind == "pretraining":
        weights = weights.encoder()
        notes.append("Left out, since timm's model is an encoder: the decoder of the pretraining")
    single = target.suffix in _FILE_SUFFIXES.get(format, ())
    if not single:
        _check_folder(target, source, format)
    facts = find_provenance(source)  # before writing, since the target may be the source's folder
    if facts.origin_license:
        if license not in (UNKNOWN, facts.origin_license):
            notes.append(
                f"The licence is given as {license}, but VideoMAE's weights, from which these started, are CC BY-NC 4.0"
            )
        license = facts.origin_license if license == UNKNOWN else license
    if format == "stm":
        write_own(weights, target if single else target / OWN_NAME, extras.states, extras.header)
        if not single and (facts.receipt or facts.origin):
            kept = ("receipt", "dataset", "clips", "origin", "origin_license")
            write_json(target / "config.json", {key: getattr(facts, key) for key in kept})
        elif not single:
            (target / "config.json").unlink(missing_ok=True)  # of an earlier export, of other weights
    elif format == "videomae":
        write_official(weights, target if single else target / CHECKPOINT_NAME)
    elif format == "timm":
        notes += write_timm(weights, target, None if license == UNKNOWN else license)
    else:
        notes += write_transformers(weights, target)
    if not single:
        _write_card(weights, facts, target, format, license, notes)
    return notes


def _own_tensors(weights: Weights) -> Weights:
    """The weights in float32, which all libraries compute with; each tensor has memory of its own, as safetensors needs."""
    tensors = {name: tensor.to(torch.float32, copy=True) for name, tensor in weights.tensors.items()}
    return replace(weights, tensors=tensors)


def _check_folder(target: Path, source: str | Path, format: Format) -> None:
    """Check that a folder does not exist, or contains nothing but an earlier export in the same format.

    Raises:
        WeightsError: it contains something else, which would be uploaded with the weights or read instead of them.
    """
    if target.exists() and not target.is_dir():
        suffixes = _FILE_SUFFIXES.get(format, ())
        ending = f", or a file that ends in {' or '.join(suffixes)}" if suffixes else ""
        raise WeightsError(f"{target}: is a file, but the format {format} is a folder{ending}")
    file = own_file(source)
    if file is not None and file.parent.resolve() == target.resolve():
        raise WeightsError(f"{target}: is the folder of the weights to convert; give a new folder")
    others = sorted(
        path.name for path in target.glob("[!.]*") if path.name not in FILES[format]
    )  # hidden files: a clone of the hub's repository
    if others:
        raise WeightsError(f"{target}: is not empty, but has {', '.join(others[:5])}; give a new folder")


def _write_card(
    weights: Weights, facts: Provenance, folder: Path, format: Format, license: str, notes: list[str]
) -> None:
    text = write_card(weights, facts, folder.resolve().name, format, license, notes)
    write_bytes(folder / "README.md", text.encode())


def _keep_extras(weights: Weights, source: str | Path, format: Format, encoder_only: bool) -> tuple[Extras, list[str]]:
    """The modules to write with the model, and a note on those that are left out."""
    file = own_file(source)
    names = read_extra_names(file) if file is not None else ()
    if not names or file is None:
        return Extras({}, {}), []
    if format == "stm" and not encoder_only:
        loaded = {name: load_extra(file, name) for name in names}
        return Extras(
            {n: state for n, (state, _) in loaded.items()}, {n: about for n, (_, about) in loaded.items()}
        ), []
    listed = ", ".join(names)
    if weights.kind == "encoder" and not encoder_only:
        raise WeightsError(
            f"{file}: has other parts besides its video encoder ({listed}), for which there is no place in the format {format}: "
            "give --encoder-only (encoder_only=True) to export the encoder alone, or --to stm for the whole model"
        )
    reason = "of --encoder-only" if encoder_only else f"there is no place for them in the format {format}"
    return Extras({}, {}), [f"Left out, because {reason}: {listed}"]
