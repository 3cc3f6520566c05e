"""Finds masking strategies and the guides that they need by parsing source files without running them.

A misspelt strategy must be reported when a workflow starts, rather than after a day of preprocessing. The config is
therefore checked at that point, where importing torch would take seconds. A strategy is one of

- `tube`: registered by a file in `stm/masking`,
- `top_rows`: an entry point of an installed package, in the group `stm.masking`,
- `masks/top_rows.py:top_rows`: defined in a user's file; the path is relative to the working directory.
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

# The decorator's importable names. Aliases are not supported, because resolving them would require running the file.
_REGISTER = ("register", "masking.register", "stm.masking.register")


class StrategyError(ValueError):
    """A masking strategy that cannot be found or imported; the message contains the location and the remedy."""


@dataclass(frozen=True)
class Declaration:
    """The declaration of a strategy in its source file."""

    name: str
    needs: tuple[str, ...]  # guides in addition to the noise
    path: Path  # the source file
    module: str | None  # module to import; None: a user's file, which is loaded by path


def find_strategy(strategy: str) -> Declaration:
    """Return the declaration of a strategy, given its name or `path/to/file.py:name`.

    A broken file does not affect strategies in other files.

    Raises:
        StrategyError: the strategy does not exist, its file cannot be read, or its name is not unique; the message
            contains the remedy.
    """
    path, separator, name = strategy.rpartition(":")
    if separator:
        return _declared_in(Path(path), name, None)
    if strategy.endswith(".py"):
        raise StrategyError(
            f"names a file, but no strategy in it; write {strategy}:NAME, with the name from its @register(NAME)"
        )
    matches = [_declared_in(path, name, _module_of(path)) for path in package_files() if name in _names_in(path)]
    matches += [_entry_declaration(point) for point in _entry_points() if point.name == name]
    if len(matches) > 1:
        places = " and ".join(str(declaration.path) for declaration in matches)
        raise StrategyError(f"{len(matches)} masking strategies are called {name!r}: in {places}; rename one")
    if not matches:
        raise StrategyError(f"no masking strategy {name!r}; there are: {', '.join(strategy_names())}{_unreadable()}")
    return matches[0]


def strategy_names() -> list[str]:
    """Return the sorted names of all strategies of stm and of installed packages, without importing them."""
    names = {name for path in package_files() for name in _names_in(path)}
    return sorted(names | {point.name for point in _entry_points()})


def user_file(strategy: str) -> str | None:
    """Return the user's file that defines a strategy; None if the strategy is not given by path."""
    return strategy.rpartition(":")[0] or None


def package_files() -> list[Path]:
    """Return the source files of `stm/masking`, sorted."""
    return sorted(FOLDER.glob("*.py"))


def _module_of(path: Path) -> str:
    return f"{GROUP}.{path.stem}"


def _names_in(path: Path) -> tuple[str, ...]:
    """Return the strategies registered by a file of the package; empty if it is unreadable (see `_unreadable`)."""
    try:
        return tuple(_read(path))
    except StrategyError:
        return ()


def _unreadable() -> str:
    """Return a note on unreadable files of the package, because a missing strategy may be defined in one of them."""
    problems = []
    for path in package_files():
        try:
            _read(path)
        except StrategyError as error:
            problems.append(str(error))
    return "".join(f". Not searched: {problem}" for problem in problems)


def _declared_in(path: Path, name: str, module: str | None) -> Declaration:
    declared = _read(path) if module else _read_registrations(path)
    if name not in declared:
        known = f"it registers: {', '.join(declared)}" if declared else "it registers none"
        raise StrategyError(f"{path} registers no masking strategy {name!r} (`@register({name!r})`); {known}")
    return Declaration(name, declared[name], path, module)


@cache
def _entry_points() -> tuple[EntryPoint, ...]:
    return tuple(entry_points(group=GROUP))


def _entry_declaration(point: EntryPoint) -> Declaration:
    package = f"the package {point.dist.name}" if point.dist else "an installed package"
    path = _locate(point.module)
    if path is None:
        raise StrategyError(
            f"the masking strategy {point.name!r} is an entry point of {package}, whose module {point.module} does not exist; "
            "reinstall the package"
        )
    return _declared_in(path, point.name, point.module)


def _locate(module: str) -> Path | None:
    """Return the source file of an installed module without importing its parent packages."""
    name, *parts = module.split(".")
    spec = find_spec(name)
    # `find_spec` with the dotted name would import the parent packages, and possibly torch with them.
    for part in parts:
        name = f"{name}.{part}"
        locations = spec.submodule_search_locations if spec else None
        spec = PathFinder.find_spec(name, locations) if locations else None
    return Path(spec.origin) if spec and spec.origin else None


def _read_registrations(path: Path) -> dict[str, tuple[str, ...]]:
    """Return the guides that each strategy needs, from the `@register(name, needs=(...))` decorators of a file.

    Raises:
        StrategyError: the file cannot be read, or the arguments of a decorator are not literals.
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
    needs_by_name: dict[str, tuple[str, ...]] = {}
    for call in _registrations(tree):
        name, needs = _arguments(call, path)
        if name in needs_by_name:
            raise StrategyError(f"{path}, line {call.lineno}: two masking strategies are called {name!r}; rename one")
        needs_by_name[name] = needs
    return needs_by_name


_read = cache(_read_registrations)  # only for installed files, because a user's file may change during a session


def _registrations(tree: ast.Module) -> Iterator[ast.Call]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            for decorator in node.decorator_list:
                if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) in _REGISTER:
                    yield decorator


def _arguments(call: ast.Call, path: Path) -> tuple[str, tuple[str, ...]]:
    arguments = dict(zip(("name", "needs"), call.args, strict=False))
    arguments |= {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}
    try:
        name, needs = (ast.literal_eval(arguments[key]) if key in arguments else () for key in ("name", "needs"))
    except ValueError:
        name, needs = None, ()
    if not isinstance(name, str) or isinstance(needs, str) or not all(isinstance(need, str) for need in needs):
        raise StrategyError(
            f"{path}, line {call.lineno}: @register needs a literal name and a literal tuple of guides, as in "
            "@register('mine', needs=('motion',)), because the config is checked without running the file"
        )
    return name, tuple(needs)
