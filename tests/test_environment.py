"""One set of versions: pyproject.toml, requirements.lock and environment.yml say the same."""

import ast
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import yaml

from stm.cli.extras import EXTRAS

ROOT = Path(__file__).parents[1]


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def locked() -> dict[str, str]:
    found = re.findall(r"^([A-Za-z0-9_.-]+)==([^ ;\\]+)", (ROOT / "requirements.lock").read_text(), re.M)
    return {plain(name): version for name, version in found}


def named(project: dict[str, Any], requirements: list[str]) -> set[str]:
    """The libraries of a list of requirements, and those of the package's own extras in it."""
    found = set[str]()
    for requirement in requirements:
        own = re.fullmatch(r"stm-video\[(.+)\]", requirement)
        for name in own[1].split(",") if own else ():
            found |= extra(project, name)
        if not own:
            found.add(plain(re.match(r"[A-Za-z0-9_.-]+", requirement).group()))
    return found


def extra(project: dict[str, Any], name: str) -> set[str]:
    return named(project, project["optional-dependencies"][name])


def test_environment_and_lock_file_name_the_same_versions():
    dependencies = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    pinned = dict(entry.split("==") for entry in dependencies[-1]["pip"])
    assert {plain(n): v for n, v in pinned.items()} == {plain(n): locked()[plain(n)] for n in pinned}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {plain(n) for n in pinned} == named(project, project["dependencies"]) | extra(project, "workflow")


def test_every_requirement_is_locked_with_a_hash():
    text = (ROOT / "requirements.lock").read_text()
    entries = re.split(r"\n(?=[A-Za-z])", text.strip())
    assert len(entries) > 50
    for entry in entries:
        assert "--hash=sha256:" in entry, entry.splitlines()[0]


def test_torch_is_the_ordinary_build():
    assert "+" not in locked()["torch"]
    assert "+" not in locked()["torchvision"]


# Libraries whose import name is not the name under which they are installed.
INSTALLED_AS = {
    **{"decord": "decord2", "ffmpeg": "ffmpeg-python", "mlflow": "mlflow-skinny", "open_clip": "open-clip-torch"},
    **{"cv2": "opencv-python-headless", "PIL": "pillow", "yaml": "pyyaml"},
}


def imported(folder: Path) -> set[str]:
    """The first names of all modules that the files of a folder import, anywhere in them."""
    trees = [node for path in folder.rglob("*.py") for node in ast.walk(ast.parse(path.read_text()))]
    names = {alias.name for node in trees if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in trees if isinstance(node, ast.ImportFrom) and not node.level}
    return {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"stm"}


def test_each_library_that_the_package_imports_is_a_dependency_or_the_command_line_knows_its_extra():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    always = named(project, project["dependencies"])
    for library in imported(ROOT / "stm") | EXTRAS.keys():
        name = plain(INSTALLED_AS.get(library, library))
        if library in EXTRAS:
            assert name in extra(project, EXTRAS[library]) - always, library
        else:
            assert name in always, library


def test_all_extras_of_users_are_in_the_extra_all():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    everything = extra(project, "all")
    for name in set(EXTRAS.values()):
        assert extra(project, name) <= everything, name
