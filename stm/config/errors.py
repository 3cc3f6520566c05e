"""Human-readable messages for mistakes in a config: the key, the value and the allowed values."""

from difflib import get_close_matches
from typing import Any

# Pydantic's messages name Python's types.
_AS_IN_YAML = {
    "tuple_type": "should be a list, such as [a, b]",
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type"), "should be a mapping of keys to values"),
}


def explain_problem(problem: Any, schema: dict[str, Any]) -> str:
    """Return one line for an entry of pydantic's `ValidationError.errors()`, using the config's JSON schema."""
    location = tuple(problem["loc"])
    # A section name in the location is a union tag rather than a key of the config.
    key = ".".join(str(part) for part in location if part not in schema.get("$defs", {})) or "the whole config"
    if problem["type"] == "extra_forbidden":
        keys, _ = _allowed(location[:-1], schema)
        close = get_close_matches(str(location[-1]), keys, n=1)
        hint = f"; did you mean `{close[0]}`?" if close else ""
        return f"{key}: no such key{hint}. Allowed here: {', '.join(keys)}"
    if problem["type"] == "missing":
        return f"{key}: this key is required"
    _, unit = _allowed(location, schema)
    value = problem["input"]
    shown = "" if isinstance(value, dict) else f" = {_show(value)}"  # a whole section would clutter the message
    message = _AS_IN_YAML.get(problem["type"]) or problem["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return f"{key}{shown}: {message}" + (f" (unit: {unit})" if unit else "")


_LONGEST = 200  # characters of a value


def _show(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python refuses to write integers of thousands of digits
        return f"a number of {value.bit_length():,} bits" if isinstance(value, int) else f"a {type(value).__name__}"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}... ({len(text):,} characters)"


def _allowed(location: tuple[Any, ...], schema: dict[str, Any]) -> tuple[list[str], str | None]:
    """Return the keys allowed at a location of the config and the unit of its value, from the JSON schema."""
    node: dict[str, Any] = schema
    for part in location:
        node = _resolve(node, schema)
        if "oneOf" in node and part in node.get("discriminator", {}).get("mapping", {}):
            node = {"$ref": node["discriminator"]["mapping"][part]}
        elif references := [o for o in node.get("oneOf", []) if o.get("$ref", "").endswith(f"/{part}")]:
            node = references[0]
        elif part in node.get("properties", {}):
            node = node["properties"][part]
        elif isinstance(node.get("additionalProperties"), dict):
            node = node["additionalProperties"]
        elif node.get("patternProperties"):  # a mapping whose keys are names: all keys have the same schema
            node = next(iter(node["patternProperties"].values()))
    resolved = _resolve(node, schema)
    return sorted(resolved.get("properties", {})), node.get("unit")


def _resolve(node: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """Follow references and unwrap nullable values."""
    while "$ref" in node:
        node = schema["$defs"][node["$ref"].rsplit("/", 1)[1]]
    options = [o for o in node.get("anyOf", []) if o.get("type") != "null"]
    return _resolve(options[0], schema) if len(options) == 1 else node
