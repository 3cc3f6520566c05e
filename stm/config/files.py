"""Config files: read, and put over what they extend.

`extends` at the top of a file names files whose values it starts from, merged as Snakemake merges `--configfile a b`.
`extends` in a run, an evaluation, a table or a figure names another one of its kind, in which it changes some keys, as
`use rule b from a with` does in a Snakefile. A name that begins with a dot is there to be extended and nothing else.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from stm.config.base import ConfigError
from stm.config.study import merge

_KINDS = ("pretrain", "evaluate", "tables", "figures")  # whose entries may extend each other
_MOST_VALUES = 100_000


def read_values(path: str | Path) -> dict[str, Any]:
    """The mapping of a YAML file over the files that it extends, unchecked. Their paths are relative to the file.

    Raises:
        ConfigError: a file is missing, no YAML, no mapping, far too large for a config, or extends itself.
    """
    return _read(Path(path), ())


def read_files(paths: Iterable[str | Path]) -> dict[str, Any]:
    """The values of several files, each with what it extends, later ones over earlier ones.

    Raises:
        ConfigError: as `read_values`.
    """
    values: dict[str, Any] = {}
    for path in paths:
        values = merge(values, read_values(path))
    return values


def resolve_config(
    config: Mapping[str, Any], files: Iterable[str | Path], overrides: Mapping[str, Any]
) -> dict[str, Any]:
    """Snakemake's `config` with everything that it extends filled in.

    Args:
        config: the merged files with the overrides, as Snakemake makes it, which does not know `extends`.
        files: the config files, in their order.
        overrides: the values of `--config`.

    Raises:
        ConfigError: a file or an entry extends what is not there, or itself.
    """
    if "extends" in config:
        config = merge(read_files(files), overrides)
    return inherit(config)


def inherit(values: Any) -> Any:
    """The values with each entry that `extends` another one filled in from it, and without names that begin with a dot.

    Raises:
        ConfigError: an entry extends one that is not there, or itself.
    """
    if not isinstance(values, Mapping):
        return values  # refused where the config is checked
    filled = dict(values)
    for kind in _KINDS:
        entries = values.get(kind)
        if isinstance(entries, Mapping):
            filled[kind] = {name: _fill(kind, name, entries, ()) for name in entries if not str(name).startswith(".")}
    return filled


def _fill(kind: str, name: Any, entries: Mapping[str, Any], extending: tuple[Any, ...]) -> Any:
    """An entry over the one that it extends; `extending`: the entries that led here."""
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
    whole = _fill(kind, base, entries, (*extending, name))
    if not isinstance(whole, Mapping):
        raise ConfigError(f"{where} = {base!r}: {kind}.{base} is not a mapping")
    return merge(whole, own)


def _read(path: Path, extending: tuple[Path, ...]) -> dict[str, Any]:
    """A file over the files that it extends; `extending`: the files that led here."""
    own = _parse(path)
    names = own.pop("extends", [])
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{path}: extends = {names!r}: must be the path of a config file, or a list of such paths")
    values: dict[str, Any] = {}
    for name in names:
        base = path.parent / name
        if base.resolve() in (path.resolve(), *(above.resolve() for above in extending)):
            raise ConfigError(f"{path}: extends {name}, which extends it in turn")
        if not base.is_file():
            raise ConfigError(f"{path}: extends {name}, but there is no file {base}; paths are relative to the file")
        values = merge(values, _read(base, (*extending, path)))
    return merge(values, own)


def _parse(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or an impossible date
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    except RecursionError:
        raise ConfigError(f"{path}: not valid YAML: nested far too deeply") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must be a mapping of keys to values")
    if _is_huge(values):
        raise ConfigError(f"{path}: has more than {_MOST_VALUES} values, counting what its aliases (`*name`) repeat")
    return values


def _is_huge(values: Any) -> bool:
    """Whether there are too many values: with aliases of aliases a short file can fill the memory."""
    waiting, count = [values], 0
    while waiting and count <= _MOST_VALUES:
        value = waiting.pop()
        count += 1
        if isinstance(value, dict | list):
            waiting += value.values() if isinstance(value, dict) else value
    return count > _MOST_VALUES
