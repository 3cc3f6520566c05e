"""Settings with one key changed, for the tests that a change is noticed."""

from collections.abc import Iterator

from pydantic import BaseModel


def changes(section: BaseModel, path: str = "") -> Iterator[tuple[str, BaseModel]]:
    """Yield the dotted name of each key, at any depth, and the section with a different value of it, valid or not."""
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            for key, changed in changes(value, f"{path}{name}."):
                yield key, section.model_copy(update={name: changed})
        else:
            # A strategy's file is hashed, so the different strategy must exist.
            other = "random" if name == "strategy" else "another"
            yield f"{path}{name}", section.model_copy(update={name: other if value != other else "other"})
