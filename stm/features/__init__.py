"""Features, predictions and retrieval for videos of one's own, without a study: `stm features`, `stm predict`, `stm retrieve`.

Examples:
    >>> import stm.features  # doctest: +SKIP
    >>> stm.features.extract("weights.safetensors", ["videos/"], "features.parquet")  # doctest: +SKIP
    >>> rows, features, _ = stm.features.read_features("features.parquet")  # doctest: +SKIP
"""

from importlib import import_module
from typing import Any

# Imported on first use: the command line reads options without loading torch.
_PLACES = {
    "ClipSettings": "settings",
    "FeatureError": "settings",
    "FeatureTable": "table",
    "extract": "extraction",
    "predict": "prediction",
    "read_features": "table",
    "retrieve": "search",
}

__all__ = ["ClipSettings", "FeatureError", "FeatureTable", "extract", "predict", "read_features", "retrieve"]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
