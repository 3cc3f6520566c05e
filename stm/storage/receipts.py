"""Receipts: the provenance of a file.

A receipt is a small JSON object: the stage, the part of the config that it used, the models' hashes and the library
versions. It contains no timestamps or machine-specific paths, so that repeating the same work produces the same bytes.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import stm


def make_receipt(stage: str, settings: Any, libraries: Sequence[str] = (), **more: Any) -> dict[str, Any]:
    """Return the receipt of an output.

    Args:
        stage: the stage's name, such as `frames`.
        settings: the part of the config that the stage used; a pydantic model or a JSON value.
        libraries: names of the distributions whose versions affect the bytes (`av`, `torch`).
        more: additional JSON values, such as `model_sha256` or `seed`.
    """
    if hasattr(settings, "model_dump"):
        settings = settings.model_dump(mode="json")
    return {"stage": stage, "settings": settings, "versions": library_versions(libraries), **more}


def library_versions(libraries: Iterable[str]) -> dict[str, str]:
    """Return the versions of stm and the named distributions; `missing` for those that are not installed."""
    versions = {"stm": stm.__version__}
    for name in libraries:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "missing"
    return versions


def hash_receipt(receipt: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a receipt; receipts with the same hash describe the same work."""
    # Keys are sorted so that the hash does not depend on the order in which a caller filled the mapping.
    return hashlib.sha256(json.dumps(receipt, sort_keys=True).encode()).hexdigest()
