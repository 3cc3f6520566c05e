"""Registers, looks up and calls strategies."""

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.abc import SourceLoader
from pathlib import Path

from torch import Tensor

from stm.config.strategies import FOLDER, Declaration, StrategyError, find_strategy, strategy_names
from stm.masking.checks import check_first, start_checks

__all__ = ["Guides", "Strategy", "get_strategy", "register", "start_checks", "strategy_digests", "strategy_names"]

Guides = Mapping[str, Tensor]
Function = Callable[[Guides, float], Tensor]


@dataclass(frozen=True)
class Strategy:
    """A registered strategy; call it like the function that it wraps."""

    name: str  # as in the config
    needs: tuple[str, ...]  # guides besides "noise"
    function: Function
    equal_slots: bool = True  # whether all slots keep the same number of tokens
    sha256: str | None = None  # of the file that defines it; None in this package

    def __call__(self, guides: Guides, ratio: float) -> Tensor:
        """Return the kept tokens, int64 [B, K], strictly ascending.

        Raises:
            MaskError: the function returned an invalid result; only the first batch is checked, see checks.py.
        """
        kept = self.function(guides, ratio)
        return check_first(kept, guides["noise"], ratio, self.name, self.equal_slots)


_registered: dict[tuple[str, str], Strategy] = {}  # by module and name
_found: dict[str, Strategy] = {}  # by the name in the config


def register(name: str, needs: Sequence[str] = (), equal_slots: bool = True) -> Callable[[Function], Function]:
    """Register the decorated function as the strategy `name`.

    The config reads `name` and `needs` from the source, without importing it: both must be literals.

    Args:
        name: the strategy's name in the config.
        needs: the guides that it reads besides the noise.
        equal_slots: False if slots may keep different numbers of tokens. A clip of S slots still hides
            S x int(ratio x N) tokens in all.
    """

    def decorate(function: Function) -> Function:
        _registered[function.__module__, name] = Strategy(name, tuple(needs), function, equal_slots)
        return function

    return decorate


def get_strategy(strategy: str) -> Strategy:
    """Import the file that defines a strategy, and return the strategy.

    Args:
        strategy: a name, or `path/to/file.py:name`.

    Raises:
        StrategyError: the strategy does not exist (the message lists the existing ones), or its file cannot be imported.
    """
    if strategy not in _found:
        declared = find_strategy(strategy)
        try:
            module, digest = _import(declared)
        except Exception as error:  # whatever the file raises
            raise StrategyError(
                f"{declared.path}, which defines the masking strategy {declared.name!r}, cannot be imported: "
                f"{type(error).__name__}: {error}"
            ) from error
        if (module, declared.name) not in _registered:
            raise StrategyError(
                f"{declared.path} was imported without registering the masking strategy {declared.name!r}"
            )
        _found[strategy] = replace(_registered[module, declared.name], name=strategy, sha256=digest)
    return _found[strategy]


def strategy_digests(strategies: Iterable[str]) -> dict[str, str]:
    """SHA-256 of each strategy file from outside this package: a run's weights depend on it."""
    digests = {strategy: get_strategy(strategy).sha256 for strategy in strategies}
    return {strategy: digest for strategy, digest in digests.items() if digest is not None}


def _import(declared: Declaration) -> tuple[str, str | None]:
    """Return the name of the imported module, and the SHA-256 of its file if it is from outside this package."""
    source = declared.path.read_bytes()
    digest = hashlib.sha256(source).hexdigest()
    if declared.module is not None:
        importlib.import_module(declared.module)
        return declared.module, None if declared.path.parent == FOLDER else digest
    place = hashlib.sha256(str(declared.path.resolve()).encode()).hexdigest()
    # Files with the same name in different folders are different modules, and so are different versions of a file.
    name = f"stm_user_mask_{declared.path.stem}_{place[:8]}_{digest[:8]}"
    if name not in sys.modules:
        _import_file(name, declared.path, source)
    return name, digest


def _import_file(name: str, path: Path, source: bytes) -> None:
    spec = importlib.util.spec_from_loader(name, _UserFile(path, source), origin=str(path))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # torch.compile and dataclasses look it up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise


class _UserFile(SourceLoader):
    """Loads exactly the bytes that were hashed, and writes no compiled file next to the user's."""

    def __init__(self, path: Path, source: bytes) -> None:
        self._path = path
        self._source = source

    def get_filename(self, fullname: str) -> str:
        return str(self._path)

    def get_data(self, path: str | bytes) -> bytes:
        return self._source
