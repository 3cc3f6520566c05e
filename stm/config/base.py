"""What all sections of a config are made of."""

from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


class ConfigError(ValueError):
    """A config that cannot be used; the message has one line per mistake: key, value, what is allowed."""


def field(default: Any, doc: str, unit: str | None = None, **bounds: Any) -> Any:
    """A field with its meaning and unit; both go into the JSON schema and into error messages."""
    return Field(default, description=doc, json_schema_extra={"unit": unit} if unit else None, **bounds)


class Section(BaseModel):
    """Base of all sections: immutable, and strict about keys and types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, validate_default=True)
    # Keys that change how fast or how safely a stage runs, but no byte of its output.
    cache_neutral: ClassVar[frozenset[str]] = frozenset()

    def fingerprint(self) -> dict[str, Any]:
        """The values that results depend on, as plain JSON types: all keys but the cache-neutral ones."""
        return self.model_dump(mode="json", exclude=set(self.cache_neutral))


def check_templates(templates: tuple[str, ...]) -> tuple[str, ...]:
    """Sentences with one place for a label each.

    Raises:
        ValueError: one has none, or several.
    """
    bad = [template for template in templates if template.count("{}") != 1]
    if bad:
        raise ValueError(f"each template needs exactly one {{}} for the label; wrong: {bad}")
    return templates


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=64)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Templates = Annotated[tuple[str, ...], AfterValidator(check_templates)]
