"""`import stm` is light, and gives the public functions when they are used."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import stm

ROOT = Path(__file__).parents[2]
PUBLIC = {"hidden", "load", "mask", "open_shards", "show"}


def python(*arguments: str) -> str:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True, cwd=ROOT).stdout


def test_import_stm_imports_nothing_outside_the_standard_library():
    code = (
        "import sys; before = set(sys.modules); import stm; dir(stm); after = {m.split('.')[0] for m in sys.modules};"
        "print(sorted(after - {m.split('.')[0] for m in before} - set(sys.stdlib_module_names)));"
        "print([m for m in sys.modules if m.startswith('stm.')])"
    )
    assert python("-c", code).splitlines() == ["['stm']", "[]"]


def test_public_names_are_listed_and_are_those_for_type_checkers():
    assert set(dir(stm)) >= PUBLIC and set(stm.__all__) == PUBLIC | {"__version__"}
    tree = ast.parse((ROOT / "stm/__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    typed = {(alias.name, node.module) for node in imports for alias in node.names}
    assert typed == {(name, getattr(stm, name).__module__) for name in PUBLIC}


def test_other_names_are_missing_as_in_any_module():
    with pytest.raises(AttributeError, match=r"^module 'stm' has no attribute 'open_shard'$"):
        stm.open_shard  # type: ignore[attr-defined]  # noqa: B018
    assert not hasattr(stm, "mask_")


def test_python_m_stm_is_the_command_line():
    assert python("-m", "stm", "--version") == python("-m", "stm.cli", "--version") == f"stm {stm.__version__}\n"
