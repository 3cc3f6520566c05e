"""Masked video and video-language pretraining, from raw videos to published tables.

What a notebook needs is here: `open_shards`, `mask`, `hidden`, `show` and `load`, from `stm.api`. Importing `stm` is light all
the same: these names are imported when they are first used, and torch, PyAV, transformers and their like by the modules that
use them. Messages go to the logger `stm`, which prints nothing unless the importing program has it do so (`stm.jobs.messages`).
"""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stm.api.encoders import load
    from stm.api.images import show
    from stm.api.masks import hidden, mask
    from stm.api.shards import open_shards

__version__ = "0.1.0"

logging.getLogger(__name__).addHandler(logging.NullHandler())

__all__ = ["__version__", "hidden", "load", "mask", "open_shards", "show"]

_MODULES = {
    "hidden": "stm.api.masks",
    "load": "stm.api.encoders",
    "mask": "stm.api.masks",
    "open_shards": "stm.api.shards",
    "show": "stm.api.images",
}

if not TYPE_CHECKING:  # for type checkers, this would be an attribute of any name

    def __getattr__(name: str) -> Any:
        """Import a public function on its first use."""
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        function = getattr(import_module(_MODULES[name]), name)
        globals()[name] = function  # later uses do not come here
        return function


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
