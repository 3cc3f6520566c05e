"""One set of versions: pyproject.toml, requirements.lock and environment.yml say the same."""

import re
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def locked() -> dict[str, str]:
    found = re.findall(r"^([A-Za-z0-9_.-]+)==([^ ;\\]+)", (ROOT / "requirements.lock").read_text(), re.M)
    return {plain(name): version for name, version in found}


def test_environment_and_lock_file_name_the_same_versions():
    dependencies = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    pinned = dict(entry.split("==") for entry in dependencies[-1]["pip"])
    assert {plain(n): v for n, v in pinned.items()} == {plain(n): locked()[plain(n)] for n in pinned}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    direct = {plain(re.match(r"[A-Za-z0-9_.-]+", d).group()) for d in project["dependencies"]}
    assert {plain(n) for n in pinned} == direct


def test_every_requirement_is_locked_with_a_hash():
    text = (ROOT / "requirements.lock").read_text()
    entries = re.split(r"\n(?=[A-Za-z])", text.strip())
    assert len(entries) > 50
    for entry in entries:
        assert "--hash=sha256:" in entry, entry.splitlines()[0]


def test_torch_is_the_ordinary_build():
    assert "+" not in locked()["torch"]
    assert "+" not in locked()["torchvision"]
