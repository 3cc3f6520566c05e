"""Receipts: what made a file.

A receipt is a small JSON object: the stage, the part of the config that it used, the models' hashes and the versions of
the libraries. It holds no time and no path of the machine, so that two runs of the same work give the same bytes.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import stm


def make_receipt(stage: str, settings: Any, libraries: Sequence[str] = (), **more: Any) -> dict[str, Any]:
    """What made an output.

    Args:
        stage: the stage's name, `frames` for instance.
        settings: the part of the config that the stage used; a pydantic model or a JSON value.
        libraries: distribution names whose versions matter for the bytes (`av`, `torch`).
        more: further JSON values, such as `model_sha256`, `seed`.
    """
    if hasattr(settings, "model_dump"):
        settings = settings.model_dump(mode="json")
    return {"stage": stage, "settings": settings, "versions": library_versions(libraries), **more}


def library_versions(libraries: Iterable[str]) -> dict[str, str]:
    """The versions of stm and of distributions by name; `missing` where one is not installed."""
    versions = {"stm": stm.__version__}
    for name in libraries:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "missing"
    return versions


def hash_receipt(receipt: Mapping[str, Any]) -> str:
    """SHA-256 of a receipt; two receipts with the same hash stand for the same work."""
    return hashlib.sha256(json.dumps(receipt, sort_keys=True).encode()).hexdigest()
