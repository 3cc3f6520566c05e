"""Reads config files and merges them over the files and entries that they extend.

`extends` at the top of a file lists its base files, which are merged as Snakemake merges `--configfile a b`. In a run,
an evaluation, a table or a figure, `extends` refers to another entry of the same kind and overrides some of its keys,
like `use rule b from a with` in a Snakefile. An entry whose name begins with a dot is a template: it can only be
extended. An entry, or a dataset, that is set to null is left out.

`package:NAME.yaml` is a config that comes with the package, wherever a file may be named.
"""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from stm.config.base import ConfigError, merge
from stm.storage.shipped import PACKAGE, shipped, shipped_configs

_log = logging.getLogger(__name__)

_KINDS = ("pretrain", "evaluate", "tables", "figures")  # sections whose entries can extend each other
_MAX_VALUES = 100_000  # far more than any real config has
_DEFAULTS = ("config/demo.yaml", "config/mine.yaml")  # of a checkout; of a folder that `stm init` wrote


def default_file(option: str) -> str:
    """Return the config to use where none is named: the working directory's `config/demo.yaml`, or else `config/mine.yaml`.

    Args:
        option: the option that names a config, for the error message.

    Raises:
        ConfigError: there is neither.
    """
    found = next((file for file in _DEFAULTS if Path(file).is_file()), None)
    if found is None:
        raise ConfigError(
            f"no config is named, and {Path.cwd()} has neither {' nor '.join(_DEFAULTS)}: name one with {option} FILE. "
            "`stm init FOLDER` writes one to start from"
        )
    return found


def read_values(path: str | Path) -> dict[str, Any]:
    """Read a YAML file, merged over the files that it extends (paths relative to the file), without validation.

    `package:NAME.yaml` is a config that comes with the package.

    Raises:
        ConfigError: a file is missing, not valid YAML, not a mapping, far too large for a config, or extends itself.
    """
    return _read(_find(path) or Path(path), ())


def read_files(paths: Iterable[str | Path]) -> dict[str, Any]:
    """Read several files, each merged over the files that it extends; later files override earlier ones.

    Raises:
        ConfigError: see `read_values`.
    """
    values: dict[str, Any] = {}
    for path in paths:
        values = merge(values, read_values(path))
    return values


def resolve_config(
    config: Mapping[str, Any], files: Iterable[str | Path], overrides: Mapping[str, Any]
) -> dict[str, Any]:
    """Resolve `extends` in Snakemake's `config`.

    Args:
        config: the files and overrides as merged by Snakemake, which does not support `extends`.
        files: the config files, in order.
        overrides: the values of `--config`.

    Raises:
        ConfigError: a file or an entry extends itself or one that does not exist.
    """
    # Read in any case: Snakemake does not notice a key that is given twice.
    values = read_files(files)
    if "extends" in config:
        # Snakemake keeps only the `extends` of the last file, so the files are read and merged again.
        config = merge(values, overrides)
    return inherit(config)


def inherit(values: Any) -> Any:
    """Merge each entry over the entry that it extends; drop templates, whose names begin with a dot, and what is null.

    Raises:
        ConfigError: an entry extends itself or one that does not exist.
    """
    if not isinstance(values, Mapping):
        return values  # reported by validation
    resolved = dict(values)
    for kind in (*_KINDS, "datasets"):
        entries = values.get(kind)
        if isinstance(entries, Mapping):
            resolved[kind] = {name: entry for name, entry in entries.items() if entry is not None}
    for kind in _KINDS:
        entries = resolved.get(kind)
        if isinstance(entries, Mapping):
            resolved[kind] = {
                name: _resolve_entry(kind, name, entries, ()) for name in entries if not str(name).startswith(".")
            }
    return resolved


def _resolve_entry(kind: str, name: Any, entries: Mapping[str, Any], extending: tuple[Any, ...]) -> Any:
    """Return an entry merged over its base entry; `extending` is the chain of entries that extend this one."""
    entry = entries[name]
    if not isinstance(entry, Mapping) or "extends" not in entry:
        return entry
    base = entry["extends"]
    where = f"{kind}.{name}.extends"
    if not isinstance(base, str) or base not in entries:
        raise ConfigError(f"{where} = {base!r}: must be one of {', '.join(str(n) for n in entries if n != name)}")
    if base in (*extending, name):
        raise ConfigError(f"{where} = {base!r}: {kind}.{base} extends {name} in turn")
    own = {key: value for key, value in entry.items() if key != "extends"}
    whole = _resolve_entry(kind, base, entries, (*extending, name))
    if not isinstance(whole, Mapping):
        raise ConfigError(f"{where} = {base!r}: {kind}.{base} is not a mapping")
    return merge(whole, own)


def _read(path: Path, extending: tuple[Path, ...]) -> dict[str, Any]:
    """Read a file, merged over the files that it extends; `extending` is the chain of files that extend this one."""
    own = _parse(path)
    names = own.pop("extends", [])
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{path}: extends = {names!r}: must be the path of a config file, or a list of such paths")
    values: dict[str, Any] = {}
    for name in names:
        base = _find(name) or path.parent / name
        if base.resolve() in (path.resolve(), *(above.resolve() for above in extending)):
            raise ConfigError(f"{path}: extends {name}, which extends it in turn")
        if not base.is_file():
            raise ConfigError(
                f"{path}: extends {name}, but there is no file {base}; paths are relative to the extending file"
            )
        values = merge(values, _read(base, (*extending, path)))
    return merge(values, own)


def _find(name: str | Path) -> Path | None:
    """Return the path of a shipped config; None if `name` is a path."""
    if not str(name).startswith(PACKAGE):
        return None
    folder = shipped("config")
    path = folder / str(name).removeprefix(PACKAGE)
    if path in folder.rglob("*.yaml"):  # a path, such as `package:../other.yaml`, would lead out of the package
        return path
    known = ", ".join(f"{PACKAGE}{one}.yaml" for one in shipped_configs())
    raise ConfigError(f"{name}: no config of this name comes with the package; it has {known}")


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, with an error for a key that is given twice, of which YAML silently takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Construct a mapping; keys merged by `<<` may be given again, which overrides them."""
        first: dict[tuple[str, str], yaml.Node] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            other = first.setdefault((key.tag, key.value), key)
            if other is not key and key.start_mark.index != other.start_mark.index:
                raise ConfigError(
                    f"line {key.start_mark.line + 1}: the key `{key.value:.100}` is given twice; "
                    f"its first value is in line {other.start_mark.line + 1}"
                )
        return super().construct_mapping(node, deep)


def parse_yaml(text: str) -> Any:
    """Return the value of a YAML text.

    Raises:
        ConfigError: a key is given twice.
        yaml.YAMLError, ValueError, RecursionError: the text is not valid YAML.
    """
    return _Loader(text).get_single_data()


def _parse(path: Path) -> dict[str, Any]:
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"))
        _log.debug(f"config: {path.absolute()}")
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a folder; name a YAML file") from None
    except FileNotFoundError:
        where = "" if path.is_absolute() else f" in {Path.cwd()}"
        own = f"; the config that comes with stm is {PACKAGE}{path.name}" if path.stem in shipped_configs() else ""
        raise ConfigError(f"{path}: there is no such file{where}{own}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error})") from error
    except UnicodeError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}; save it as UTF-8") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an invalid date, or a number of thousands of digits
        hint = "; YAML is indented with blanks, not tabs" if "'\\t'" in str(error) else ""
        raise ConfigError(f"{path}: not valid YAML: {error}{hint}") from error
    except RecursionError:
        raise ConfigError(f"{path}: not valid YAML: nested too deeply") from None
    if values is None:
        raise ConfigError(f"{path}: has no keys; it must be a mapping of keys to values")
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must be a mapping of keys to values, is {type(values).__name__} {values!r:.60}")
    if _is_huge(values):
        raise ConfigError(f"{path}: has more than {_MAX_VALUES} values, counting values repeated by aliases (`*name`)")
    return values


def _is_huge(values: Any) -> bool:
    """Whether there are too many values; counting stops at a limit, because aliases can multiply them exponentially."""
    stack = [values]
    count = 0
    while stack and count <= _MAX_VALUES:
        value = stack.pop()
        count += 1
        if isinstance(value, dict | list):
            stack += value.values() if isinstance(value, dict) else value
    return count > _MAX_VALUES
