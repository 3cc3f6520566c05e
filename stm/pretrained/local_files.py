"""Lists and hashes the files of model ids that name local folders or files, or models that come with the package."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stm.storage.files import sha256_file
from stm.storage.shipped import PACKAGE, model_path, shipped_models

ACTION_CLIP = "actionclip:"  # precedes the file of an ActionCLIP checkpoint
_WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
_PREFIXES = ("local-dir:", "transformers:", ACTION_CLIP)


def hash_weights(path: Path) -> str:
    """Return a model's SHA-256: of the file, or of the names and bytes of all files in a folder."""
    if path.is_file():
        return sha256_file(path)
    digest = hashlib.sha256()
    # Hidden files, such as a download's lock files, are not part of the model.
    for file in sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith(".")):
        digest.update(f"{file.relative_to(path).as_posix()}\0{sha256_file(file)}\n".encode())
    return digest.hexdigest()


def local_model_files(model: str | None) -> list[str]:
    """List the files of a model id from the config if it is local; hub ids have none.

    Accepts a folder, `package:name`, `local-dir:folder`, `transformers:folder`, `actionclip:checkpoint-file` or
    `architecture@checkpoint-file`. The workflow declares the files as inputs, so that changed weights trigger a rerun of the
    stages that depend on them.
    """
    local = _find_local(model or "")
    if local is None:
        return []
    _, path = local
    if path.is_file():
        return [path.as_posix()]
    return sorted(p.as_posix() for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))


def find_missing(model: str | None) -> str | None:
    """Return the path of a model id that can only name a local file or folder and does not exist; None for all others.

    `owner/name` may be a hub id, and is not refused.
    """
    if not model or model.startswith("hf-hub:") or _find_local(model) is not None:
        return None
    prefix = next((known for known in (*_PREFIXES, "clip:") if model.startswith(known)), "")
    name = model.removeprefix(prefix)
    if prefix == "clip:":
        return find_missing(name)
    if prefix in ("local-dir:", ACTION_CLIP) or name.startswith(PACKAGE):
        return name
    _, _, checkpoint = name.partition("@")
    path = checkpoint or name
    is_path = path.startswith((".", "/", "~")) or path.count("/") > 1 or path.endswith(("/", *_WEIGHT_SUFFIXES))
    return path if is_path else None


def explain_unknown(model: str) -> str:
    """Return the end of a message about a model `package:NAME` that the package does not have."""
    return (
        f"no model of this name comes with the package; it has {', '.join(PACKAGE + name for name in shipped_models())}"
    )


def without_folders(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Reduce a local `model` or `weights` in a stage's settings to its base name, without parent folders.

    `local-dir:/data/clip` becomes `local-dir:clip`; hub ids and shipped models are left unchanged.
    """
    plain = dict(settings)
    for key in ("model", "weights"):
        local = _find_local(plain.get(key) or "")
        if local is not None and PACKAGE not in plain[key]:
            before, path = local
            plain[key] = f"{before}{path.resolve().name}"
    return plain


def _find_local(model: str) -> tuple[str, Path] | None:
    """Return the prefix and the path of a local model's id."""
    prefix = next((known for known in _PREFIXES if model.startswith(known)), "")
    name = model.removeprefix(prefix)
    architecture, sign, checkpoint = name.partition("@")
    for before, path in ((prefix, name), (f"{prefix}{architecture}{sign}", checkpoint)):
        if path and (model_path(path).is_dir() or model_path(path).is_file()):
            return before, model_path(path)
    return None
