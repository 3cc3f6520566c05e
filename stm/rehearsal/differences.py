"""The keys in which the rehearsed config differs from the full one, and their description."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from stm.config import Config

_NAMED = ("datasets", "pretrain", "evaluate", "captions", "tables", "figures")  # sections whose entries have names
_ABSENT = "absent"


class Difference(NamedTuple):
    """A key with another value in the rehearsal."""

    key: tuple[str, ...]  # of the config, outermost first
    full: Any  # plain JSON values
    rehearsed: Any


def list_differences(full: Config, rehearsed: Config) -> list[Difference]:
    """Return all keys whose values differ, in the order of the config."""
    before, after = (dict(_leaves(config.model_dump(mode="json"), ())) for config in (full, rehearsed))
    keys = [*before, *(key for key in after if key not in before)]
    pairs = ((key, before.get(key, _ABSENT), after.get(key, _ABSENT)) for key in keys)
    return [Difference(key, one, other) for key, one, other in pairs if one != other]


def undo_differences(rehearsed: Config, differences: list[Difference]) -> dict[str, Any]:
    """Return the plain values of the full config: those of the rehearsed one with every difference undone."""
    values: dict[str, Any] = rehearsed.model_dump(mode="json")
    for difference in differences:
        section = values
        for name in difference.key[:-1]:
            section = section[name]
        section[difference.key[-1]] = difference.full
    return values


def describe_differences(differences: list[Difference]) -> str:
    """Return one line per kind of difference: the key with `*` for names, both values, and how often it occurs."""
    counts = Counter((_pattern(d.key), _shown(d.full), _shown(d.rehearsed)) for d in differences)
    width = max((len(key) for key, _, _ in counts), default=0)
    lines = []
    for (key, full, rehearsed), count in counts.items():
        times = f"  ({count} times)" if count > 1 else ""
        lines.append(f"  {key:{width}}  {full} -> {rehearsed}{times}")
    return "\n".join(lines)


def _leaves(values: Mapping[str, Any], key: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, (*key, str(name)))
        else:
            yield (*key, str(name)), value


def _pattern(key: tuple[str, ...]) -> str:
    return ".".join("*" if before in _NAMED else name for before, name in zip(("", *key), key, strict=False))


def _shown(value: Any) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
