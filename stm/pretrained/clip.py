"""Loads a CLIP and its input statistics with open_clip, from a model string, and embeds texts."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip.pretrained import download_pretrained, download_pretrained_from_hf, get_pretrained_cfg
from torch.nn import functional

from stm.distributed.process import choose_device
from stm.pretrained.hub import PRECISIONS, ModelError
from stm.pretrained.local_files import explain_unknown, hash_weights
from stm.storage.files import sha256_file
from stm.storage.shipped import PACKAGE, model_path

_HUB, _FOLDER = "hf-hub:", "local-dir:"
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.spm")
_ENDINGS = (".safetensors", ".pt", ".pth", ".bin")


@dataclass(frozen=True)
class LoadedClip:
    """A loaded CLIP; the text tower always computes in float32."""

    model: Any  # an open_clip CLIP or CoCa, untyped
    tokenizer: Any
    image_size: tuple[int, int]  # height and width of the image tower's input, in pixels
    mean: tuple[float, float, float]  # for pixels in [0, 1]
    std: tuple[float, float, float]
    precision: torch.dtype  # of the image tower
    device: torch.device
    identity: dict[str, str]  # for receipts


@dataclass(frozen=True)
class _ClipSource:
    """The parts of a model string."""

    architecture: str  # open_clip's name, with its `hf-hub:` or `local-dir:` prefix
    checkpoint: str | None  # a weights file; None: the architecture's default
    normalisation: dict[str, Any]  # of the pretrained tag, overriding open_clip's default
    label: str  # for receipts, without local paths
    weights_sha256: str


def load_clip(
    name: str, precision: str = "float32", device: str | None = None, setting: str = "similarity.model"
) -> LoadedClip:
    """Load the CLIP that a config names.

    Args:
        name: `architecture@pretrained tag`, `architecture@checkpoint file`, `hf-hub:owner/name`, `local-dir:folder`, or
            `package:name` of a model that comes with the package. Files and folders are relative to the working
            directory. Only tags and `hf-hub:` can trigger downloads.
        precision: the image tower's precision: float32, bfloat16 or float16.
        device: by default CUDA where available.
        setting: the config key of the model, for error messages.

    Raises:
        ModelError: the architecture, tag, file or folder is unknown, or the weights do not match.
    """
    try:
        source = _find(name)
    except ModelError as error:
        raise ModelError(f"{setting} {name!r}: {error}") from error
    place = choose_device(device)
    arguments = {"pretrained": source.checkpoint} if source.checkpoint else {}
    try:
        model = open_clip.create_model(
            source.architecture,
            require_pretrained=True,  # otherwise a folder without weights yields a random model and only a log line
            # Rejects pickled code in a checkpoint.
            weights_only=True,
            force_preprocess_cfg=source.normalisation or None,
            **arguments,
        )
        tokenizer = open_clip.get_tokenizer(source.architecture)
    except ModuleNotFoundError:
        raise  # the command line names the extra that installs the library
    except Exception as error:  # open_clip raises many exception types, including pickle's
        raise ModelError(f"{setting} {name!r} cannot be loaded: {error}") from error
    model = model.to(place).eval().requires_grad_(False)
    # open_clip's own half-precision modes would also convert the text tower.
    model.visual.to(PRECISIONS[precision])
    config = model.visual.preprocess_cfg
    size = config["size"]
    height, width = (size, size) if isinstance(size, int) else size
    return LoadedClip(
        model=model,
        tokenizer=tokenizer,
        image_size=(height, width),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        precision=PRECISIONS[precision],
        device=place,
        identity={"model": source.label, "weights_sha256": source.weights_sha256},
    )


def _find(name: str) -> _ClipSource:
    """Resolve a model string; its errors complete a sentence that the caller starts with the setting and the name."""
    if name.startswith((_FOLDER, PACKAGE)):
        return _find_folder(name)
    if name.startswith(_HUB):
        weights = _download(lambda: download_pretrained_from_hf(name.removeprefix(_HUB)))
        return _ClipSource(name, None, {}, name, sha256_file(weights))
    architecture, _, weights_name = name.partition("@")
    _check_architecture(architecture)
    if not weights_name:
        raise ModelError(
            f"does not name its weights; write {architecture}@tag or {architecture}@file. Its tags: {_tags(architecture)}"
        )
    config = get_pretrained_cfg(architecture, weights_name)
    return _find_tag(name, architecture, weights_name, config) if config else _find_file(architecture, weights_name)


def _find_folder(name: str) -> _ClipSource:
    folder = model_path(name.removeprefix(_FOLDER))
    if name.startswith(PACKAGE) and not folder.is_dir():
        raise ModelError(explain_unknown(name))
    if not (folder / "open_clip_config.json").is_file():
        raise ModelError(
            f"{folder} has no open_clip_config.json (paths are relative to the working directory {Path.cwd()})"
        )
    try:
        config = json.loads((folder / "open_clip_config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{folder / 'open_clip_config.json'} is not valid JSON: {error}") from error
    own_tokenizer = config.get("model_cfg", {}).get("text_cfg", {}).get("hf_tokenizer_name")
    if own_tokenizer and not any(file for pattern in _TOKENIZER_FILES for file in folder.glob(pattern)):
        raise ModelError(
            f"{folder} has no tokenizer files, which its open_clip_config.json asks for: copy tokenizer.json and "
            f"tokenizer_config.json of {own_tokenizer} into it"
        )
    label = name if name.startswith(PACKAGE) else f"{_FOLDER}{folder.resolve().name}"
    return _ClipSource(f"{_FOLDER}{folder}", None, {}, label, hash_weights(folder))


def _check_architecture(architecture: str) -> None:
    known = open_clip.list_models()
    if architecture in known:
        return
    close = get_close_matches(architecture, known, n=5, cutoff=0.5)
    hint = f"; similar names: {', '.join(close)}" if close else ""
    raise ModelError(
        f"open_clip has no architecture {architecture!r}{hint}. Allowed forms: "
        "architecture@tag, architecture@file, hf-hub:owner/name, local-dir:folder, package:name"
    )


def _tags(architecture: str) -> str:
    return ", ".join(open_clip.list_pretrained_tags_by_model(architecture)) or "none"


def _find_tag(name: str, architecture: str, tag: str, config: dict[str, Any]) -> _ClipSource:
    trained_with = bool(config.get("quick_gelu", False))
    built_with = bool(open_clip.get_model_config(architecture).get("quick_gelu", False))
    if trained_with != built_with:  # open_clip only warns, but the embeddings would be wrong
        other = f"{architecture}-quickgelu" if trained_with else architecture.removesuffix("-quickgelu")
        raise ModelError(f"the weights {tag!r} belong to {other}; write {other}@{tag}")
    weights = _download(lambda: download_pretrained(config))
    keys = ("mean", "std", "interpolation", "resize_mode")
    return _ClipSource(
        architecture, str(weights), {k: config[k] for k in keys if k in config}, name, sha256_file(weights)
    )


def _find_file(architecture: str, file: str) -> _ClipSource:
    path = Path(file).expanduser()
    if not path.is_file():
        close = get_close_matches(file, open_clip.list_pretrained_tags_by_model(architecture), n=3)
        hint = f" (did you mean {' or '.join(close)}?)" if close else ""
        raise ModelError(
            f"{file!r} is neither a file (relative to {Path.cwd()}) nor a tag of "
            f"{architecture}{hint}. Its tags: {_tags(architecture)}"
        )
    if path.suffix not in _ENDINGS:
        raise ModelError(f"weights must end in {', '.join(_ENDINGS)}")
    return _ClipSource(architecture, str(path), {}, f"{architecture}@{path.name}", sha256_file(path))


def _download(get: Any) -> Path:
    try:
        return Path(get())
    except Exception as error:  # network, permission, missing file: all handled alike
        raise ModelError(f"cannot be downloaded: {error}") from error


TEXT_BATCH = 64  # texts per forward pass; the text tower's cost is negligible next to the image tower's


@torch.inference_mode()
def embed_texts(clip: LoadedClip, texts: Sequence[str], batch_size: int = TEXT_BATCH) -> np.ndarray:
    """Return projected, normalised embeddings of texts, float32 [K, D]; CLIP takes them at [EOS], SigLIP at the last position.

    The model's tokenizer truncates texts longer than its context. The last batch is padded with empty texts to a full batch
    or to the next multiple of TEXT_BATCH: matrix products can differ in the last bit depending on the number of rows, and
    padding keeps that number constant for all but a few texts.
    """
    vectors = []
    unit = min(batch_size, TEXT_BATCH)
    for start in range(0, len(texts), batch_size):
        batch = list(texts[start : start + batch_size])
        padded = batch + [""] * (min(batch_size, -(-len(batch) // unit) * unit) - len(batch))
        features = clip.model.encode_text(clip.tokenizer(padded).to(clip.device))
        vectors.append(functional.normalize(features.float(), dim=-1)[: len(batch)].cpu().numpy())
    return np.concatenate(vectors)
