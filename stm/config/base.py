"""Base class and shared types of all config sections, and how configs are merged."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


class ConfigError(ValueError):
    """An invalid config; the message has one line per mistake: the key, the value and the allowed values."""


def field(default: Any, doc: str, unit: str | None = None, **bounds: Any) -> Any:
    """Declare a field with its meaning and unit, which appear in the JSON schema and in error messages."""
    return Field(default, description=doc, json_schema_extra={"unit": unit} if unit else None, **bounds)


class Section(BaseModel):
    """Base class of all sections: immutable; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, validate_default=True)
    # Keys that affect the speed or robustness of a stage but not its output. Changing them must not rerun it.
    cache_neutral: ClassVar[frozenset[str]] = frozenset()

    def fingerprint(self) -> dict[str, Any]:
        """Return the values that results depend on, as plain JSON types: all keys except the cache-neutral ones."""
        return self.model_dump(mode="json", exclude=set(self.cache_neutral))


def check_templates(templates: tuple[str, ...]) -> tuple[str, ...]:
    """Return the templates if each has exactly one `{}` for the label.

    Raises:
        ValueError: a template has no `{}` or several.
    """
    invalid = [template for template in templates if template.count("{}") != 1]
    if invalid:
        raise ValueError(f"each template needs exactly one {{}} for the label; invalid: {invalid}")
    return templates


def check_path(path: str) -> str:
    """Return a path if it names a place as it is written; `~` and variables are not expanded.

    Raises:
        ValueError: it is empty, begins with `~`, has blanks at its ends, or has line breaks or other control characters.
    """
    if not path.strip():
        raise ValueError("must not be empty; `.` is the folder in which stm is started")
    if path.startswith("~"):
        raise ValueError("`~` is not expanded; write the whole path, such as /home/name/videos")
    if path.startswith("$"):
        raise ValueError("variables are not expanded; write the whole path")
    if path != path.strip():
        raise ValueError("has white space at its ends; remove it, or rename the file or folder")
    if not path.isprintable() and any(ord(character) < 32 for character in path):
        raise ValueError("must not contain line breaks, tabs or other control characters")
    return path


def check_pattern_free(path: str) -> str:
    """Return a path of the workflow's own files if Snakemake does not take a part of it for a wildcard.

    Raises:
        ValueError: it has braces.
    """
    if "{" in path or "}" in path:
        raise ValueError(
            "must not contain braces, which are wildcards in the workflow's paths; rename the file or folder"
        )
    return path


Place = Annotated[str, AfterValidator(check_path)]  # a file or folder that is only read
WorkflowPlace = Annotated[Place, AfterValidator(check_pattern_free)]  # one that rules name as an input or output
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=64)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Templates = Annotated[tuple[str, ...], AfterValidator(check_templates)]


def merge(base: Mapping[str, Any], update: Mapping[str, Any], kind: str | None = None) -> dict[str, Any]:
    """Merge `update` into `base` recursively: nested mappings are merged, other values are overwritten by `update`.

    Args:
        kind: key that contains the type of a mapping; mappings of different types are replaced rather than merged.
    """
    merged = dict(base)
    for key, value in update.items():
        old = merged.get(key)
        if isinstance(value, Mapping) and isinstance(old, Mapping) and _same_kind(old, value, kind):
            merged[key] = merge(old, value, kind)
        else:
            merged[key] = value
    return merged


def _same_kind(one: Mapping[str, Any], other: Mapping[str, Any], kind: str | None) -> bool:
    return kind is None or kind not in one or kind not in other or one[kind] == other[kind]
