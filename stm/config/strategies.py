"""Where masking strategies are defined and which guides they need, read from source files without running them.

The config is checked when a workflow starts, where importing torch would cost seconds; a misspelt strategy must be noticed
there, not after a day of preprocessing. A strategy is one of

- `tube`: registered by a file of `stm/masking`,
- `top_rows`: an entry point of an installed package, in the group `stm.masking`,
- `masks/top_rows.py:top_rows`: in a file of the user's own; the path is relative to the working directory.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.machinery import PathFinder
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "masking"
GROUP = "stm.masking"

_REGISTER = ("register", "masking.register", "stm.masking.register")


class StrategyError(ValueError):
    """A masking strategy cannot be found or imported; the message says where and what to do."""


@dataclass(frozen=True)
class Declaration:
    """A strategy as its source file declares it."""

    name: str
    needs: tuple[str, ...]  # guides besides the noise
    path: Path  # the source file
    module: str | None  # what to import; None: a user's file, which is loaded by its path


def find_strategy(strategy: str) -> Declaration:
    """The declaration of a strategy, by its name or by `path/to/file.py:name`.

    Only the files that can define it matter: a broken one does not hide the others.

    Raises:
        StrategyError: it does not exist, its file cannot be read, or its name is taken twice; the message says what to do.
    """
    path, separator, name = strategy.rpartition(":")
    if separator:
        return _declared_in(Path(path), name, None)
    if strategy.endswith(".py"):
        raise StrategyError(
            f"names a file, but not which strategy of it; write {strategy}:NAME, as in its @register(NAME)"
        )
    found = [_declared_in(path, name, _module_of(path)) for path in package_files() if name in _names_in(path)]
    found += [_entry_declaration(point) for point in _entry_points() if point.name == name]
    if len(found) > 1:
        places = " and ".join(str(declaration.path) for declaration in found)
        raise StrategyError(f"{len(found)} masking strategies are called {name!r}: in {places}; rename one")
    if not found:
        raise StrategyError(f"no masking strategy {name!r}; there are: {', '.join(strategy_names())}{_unreadable()}")
    return found[0]


def strategy_names() -> list[str]:
    """The names of all strategies of the package and of installed packages, sorted; nothing is imported."""
    names = {name for path in package_files() for name in _names_in(path)}
    return sorted(names | {point.name for point in _entry_points()})


def user_file(strategy: str) -> str | None:
    """The user's own file that a strategy is in; None for a strategy with a plain name."""
    return strategy.rpartition(":")[0] or None


def package_files() -> list[Path]:
    """The source files of `stm/masking`."""
    return sorted(FOLDER.glob("*.py"))


def _module_of(path: Path) -> str:
    return f"{GROUP}.{path.stem}"


def _names_in(path: Path) -> tuple[str, ...]:
    """What a file of the package registers; nothing where it cannot be read (see `_unreadable`)."""
    try:
        return tuple(_read(path))
    except StrategyError:
        return ()


def _unreadable() -> str:
    """A sentence about the files of the package that cannot be read: the missing strategy may be in one of them."""
    faults = []
    for path in package_files():
        try:
            _read(path)
        except StrategyError as error:
            faults.append(str(error))
    return "".join(f". Not searched: {fault}" for fault in faults)


def _declared_in(path: Path, name: str, module: str | None) -> Declaration:
    declared = _read(path) if module else _read_registrations(path)
    if name not in declared:
        there = f"it registers: {', '.join(declared)}" if declared else "it registers none"
        raise StrategyError(f"{path} registers no masking strategy {name!r} (`@register({name!r})`); {there}")
    return Declaration(name, declared[name], path, module)


@cache
def _entry_points() -> tuple[EntryPoint, ...]:
    return tuple(entry_points(group=GROUP))


def _entry_declaration(point: EntryPoint) -> Declaration:
    package = f"the package {point.dist.name}" if point.dist else "an installed package"
    path = _locate(point.module)
    if path is None:
        raise StrategyError(
            f"the masking strategy {point.name!r} is an entry point of {package}, whose module {point.module} is not there; "
            "install the package again"
        )
    return _declared_in(path, point.name, point.module)


def _locate(module: str) -> Path | None:
    """The source file of an installed module, found without importing the packages that it is in."""
    first, *inner = module.split(".")
    spec, name = find_spec(first), first
    for part in inner:
        name = f"{name}.{part}"
        inside = spec.submodule_search_locations if spec else None
        spec = PathFinder.find_spec(name, inside) if inside else None
    return Path(spec.origin) if spec and spec.origin else None


def _read_registrations(path: Path) -> dict[str, tuple[str, ...]]:
    """Name -> guides needed, from the `@register(name, needs=(...))` decorators of a file.

    Raises:
        StrategyError: the file cannot be read, or a decorator's name or needs are not literals.
    """
    try:
        tree = ast.parse(path.read_bytes(), str(path))
    except OSError as error:
        reason = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        hint = "" if path.is_absolute() else f" (paths are relative to the working directory, {Path.cwd()})"
        raise StrategyError(f"{path} {reason}{hint}") from error
    except (SyntaxError, ValueError) as error:
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        raise StrategyError(f"{path}{line}: not valid Python ({error.args[0]})") from error
    found: dict[str, tuple[str, ...]] = {}
    for call in _registrations(tree):
        name, needs = _arguments(call, path)
        if name in found:
            raise StrategyError(f"{path}, line {call.lineno}: two masking strategies are called {name!r}; rename one")
        found[name] = needs
    return found


_read = cache(_read_registrations)  # of installed files; a user's own may change while a session lasts


def _registrations(tree: ast.Module) -> Iterator[ast.Call]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            for decorator in node.decorator_list:
                if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) in _REGISTER:
                    yield decorator


def _arguments(call: ast.Call, path: Path) -> tuple[str, tuple[str, ...]]:
    given = dict(zip(("name", "needs"), call.args, strict=False))
    given |= {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}
    try:
        name, needs = (ast.literal_eval(given[key]) if key in given else () for key in ("name", "needs"))
    except ValueError:
        name, needs = None, ()
    if not isinstance(name, str) or isinstance(needs, str) or not all(isinstance(need, str) for need in needs):
        raise StrategyError(
            f"{path}, line {call.lineno}: @register needs a literal name and a literal tuple of guides, as in "
            "@register('mine', needs=('motion',)): the config is checked without running the file"
        )
    return name, tuple(needs)
