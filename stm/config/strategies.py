"""Which masking strategies there are and which guides they need, read from `stm/masking/*.py` without running it.

The config is checked when a workflow starts, where importing torch would cost seconds; a misspelt strategy must be noticed
there, not after a day of preprocessing.
"""

import ast
from functools import cache
from pathlib import Path


@cache
def declared_strategies() -> dict[str, tuple[str, ...]]:
    """Name -> guides needed, from the `@register(name, needs=(...))` decorators of the package's files."""
    found: dict[str, tuple[str, ...]] = {}
    for path in sorted((Path(__file__).parents[1] / "masking").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for decorator in getattr(node, "decorator_list", []):
                if isinstance(decorator, ast.Call) and getattr(decorator.func, "id", "") == "register":
                    needs = [ast.literal_eval(k.value) for k in decorator.keywords if k.arg == "needs"]
                    needs += [ast.literal_eval(a) for a in decorator.args[1:2]]
                    found[ast.literal_eval(decorator.args[0])] = tuple(needs[0]) if needs else ()
    return found
