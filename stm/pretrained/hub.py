"""Locates and identifies the files of transformers models."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch

from stm.pretrained.local_files import explain_unknown, hash_weights
from stm.storage.shipped import PACKAGE, model_path

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class ModelError(ValueError):
    """A model that a config names cannot be loaded; the message states what was looked for and the remedy."""


def exact_convolutions(device: torch.device) -> AbstractContextManager[None]:
    """Keep cuDNN from using TF32 and from choosing algorithms by timing, so that results do not vary between runs."""
    if device.type != "cuda":
        return nullcontext()
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)


class ModelSource(NamedTuple):
    """A hub id, a local folder, or a model that comes with the package (`package:name`)."""

    name: str
    folder: Path | None

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments for transformers' `from_pretrained`; a local folder never uses the network."""
        return {
            "pretrained_model_name_or_path": self.name if self.folder is None else str(self.folder),
            "local_files_only": self.folder is not None,
            # A model repository must not run code here.
            "trust_remote_code": False,
        }

    @property
    def label(self) -> str:
        """The name for receipts, which contain no local paths: a folder is reduced to its base name."""
        return (
            self.name if self.folder is None or self.name.startswith(PACKAGE) else f"local:{self.folder.resolve().name}"
        )

    def identify(self, commit: str | None) -> dict[str, str | None]:
        """The identity for receipts: a folder's hash, or the hub's commit."""
        if self.folder is not None:
            return {"model": self.label, "weights_sha256": hash_weights(self.folder)}
        return {"model": self.label, "commit": commit}


def find_model(name: str) -> ModelSource:
    """Distinguish a local folder, a model that comes with the package (`package:name`), and a hub id (`name` or `owner/name`).

    Relative paths are resolved against the working directory. A name that can only be a path must exist, so that a mistyped
    folder is never looked up on the hub.

    Raises:
        ModelError: the name is a path, but not a folder, or the package has no such model.
    """
    folder = model_path(name)
    if folder.is_dir():
        return ModelSource(name, folder)
    if name.startswith(PACKAGE):
        raise ModelError(f"model {name!r}: {explain_unknown(name)}")
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith("/"):
        raise ModelError(f"model {name!r}: no such folder (paths are relative to the working directory {Path.cwd()})")
    return ModelSource(name, None)


def load_complete(model_class: Any, source: ModelSource, precision: str, device: torch.device, **arguments: Any) -> Any:
    """Load a transformers model in eval mode, with every weight from its files.

    transformers only warns about missing weights and leaves them random. Further arguments are passed to the class.

    Raises:
        ModelError: weights are missing, or the model cannot be loaded.
    """
    try:
        # The dtype is always passed, because transformers otherwise uses the checkpoint's.
        model, report = model_class.from_pretrained(
            **source.arguments, dtype=PRECISIONS[precision], output_loading_info=True, **arguments
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise explain_missing(source, error) from error
    missing = sorted({*report["missing_keys"], *(str(key) for key in report["mismatched_keys"])})
    if missing:
        raise ModelError(
            f"model {source.name!r} is not a complete {model_class.__name__}: {len(missing)} weights are missing or have "
            f"the wrong shape, for instance {missing[0]}"
        )
    return model.to(device).eval()


def explain_missing(source: ModelSource, error: Exception) -> ModelError:
    """Return the error for a model that transformers could not load."""
    where = "the hub" if source.folder is None else f"the folder {source.folder}"
    hint = "" if source.folder is not None else f"; there is no local folder {source.name!r} either"
    # torch's and transformers' messages say how to load such files all the same, by running their code.
    reason = str(error)
    if "weights_only" in reason:
        reason = "its file of weights holds more than weights, and loading it could run code, so stm refuses to"
    if "trust_remote_code" in reason:
        reason = "it comes with code of its own, which would have to be run, so stm refuses to"
    return ModelError(f"model {source.name!r} cannot be loaded from {where}{hint}: {reason}")
