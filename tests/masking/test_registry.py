"""How strategies are found: files of the package, entry points of installed packages, and files of the user's own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import stm.masking
from stm.config import strategies
from stm.masking import get_strategy, registry, strategy_digests, strategy_names

ROOT = Path(__file__).parents[2]
CHECKERBOARD = '''
"""Keeps every second token."""
import torch
from stm.masking import register

@register("checkerboard", needs=("motion",))
def checkerboard(guides, ratio):
    batch, slots, tokens = guides["noise"].shape
    return torch.arange(0, slots * tokens, 2).expand(batch, -1)
'''
GUIDES = {"noise": torch.rand(1, 1, 4)}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that counts as a part of `stm/masking`; what is found in a test is forgotten after it."""
    folder = tmp_path / "masking"
    folder.mkdir()
    ours = strategies.package_files()
    monkeypatch.setattr(strategies, "package_files", lambda: [*ours, *sorted(folder.glob("*.py"))])
    monkeypatch.setattr(stm.masking, "__path__", [*stm.masking.__path__, str(folder)])
    monkeypatch.setattr(registry, "_found", {})
    return folder


def test_an_unknown_strategy_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'tubes'; there are: .*\bmotion, .*\brandom, .*\btext_top, .*\btube\b"):
        get_strategy("tubes")


def test_a_new_file_is_a_new_strategy(package: Path) -> None:
    (package / "checkerboard_for_tests.py").write_text(CHECKERBOARD)
    assert "checkerboard" in strategy_names()
    strategy = get_strategy("checkerboard")
    assert strategy.needs == ("motion",)
    assert strategy(GUIDES, 0.5).tolist() == [[0, 2]]


def test_two_files_may_not_claim_one_name(package: Path) -> None:
    (package / "another_tube.py").write_text(CHECKERBOARD.replace('"checkerboard"', '"tube"'))
    with pytest.raises(
        ValueError, match=r"2 masking strategies are called 'tube': in .*tube\.py and .*another_tube\.py"
    ):
        get_strategy("tube")
    assert get_strategy("random").name == "random"


def test_one_file_may_not_claim_a_name_twice(tmp_path: Path) -> None:
    path = tmp_path / "twice.py"
    path.write_text(CHECKERBOARD + CHECKERBOARD)
    with pytest.raises(ValueError, match=r"twice\.py, line 15: two masking strategies are called 'checkerboard'"):
        get_strategy(f"{path}:checkerboard")


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("def f(:\n", r"broken\.py, line 1: not valid Python"),
        ("NAME = 'mine'\n\n@register(NAME)\ndef mine(guides, ratio): ...\n", r"broken\.py, line 3: .*literal name"),
        ("@register('mine', needs='motion')\ndef mine(guides, ratio): ...\n", r"broken\.py, line 1: .*literal tuple"),
    ],
)
def test_an_unreadable_file_stops_no_other_and_is_named_where_a_name_is_missing(
    package: Path, text: str, error: str
) -> None:
    (package / "broken.py").write_text(text)
    assert get_strategy("tube")(GUIDES, 0.5).shape == (1, 2)
    assert "tube" in strategy_names()
    with pytest.raises(ValueError, match=f"no masking strategy 'mine'.*Not searched: .*{error}"):
        get_strategy("mine")


def test_a_file_that_cannot_be_imported_stops_only_the_runs_that_use_it(package: Path) -> None:
    (package / "failing_for_tests.py").write_text("import nowhere_at_all\n" + CHECKERBOARD)
    assert get_strategy("tube").name == "tube"
    with pytest.raises(
        ValueError, match=r"failing_for_tests\.py, .*'checkerboard'.*ModuleNotFoundError: .*nowhere_at_all"
    ):
        get_strategy("checkerboard")


def test_only_the_file_that_is_asked_for_is_imported() -> None:
    code = "import sys; from stm.masking import get_strategy; get_strategy('tube');"
    code += "print(sorted(m for m in sys.modules if m.startswith('stm.masking.')))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert loaded.strip() == str([f"stm.masking.{name}" for name in ("checks", "registry", "tokens", "tube")])


# ------------------------------------------------------------------------------------------------- the user's own files


def test_a_file_of_the_users_own_is_found_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "tube.py").write_text(CHECKERBOARD.replace('"checkerboard"', '"tube"'))
    monkeypatch.chdir(tmp_path)
    strategy = get_strategy("masks/tube.py:tube")
    assert (strategy.name, strategy.needs) == ("masks/tube.py:tube", ("motion",))
    assert strategy(GUIDES, 0.5).tolist() == [[0, 2]]
    assert get_strategy("tube").needs == ()  # the package's own, as before
    assert sorted(p.name for p in (tmp_path / "masks").iterdir()) == ["tube.py"]  # no compiled files


def test_files_of_one_name_and_versions_of_a_file_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (tmp_path / name / "mine.py" for name in "ab")
    for path, kept in ((first, "0, slots"), (second, "1, slots")):
        path.parent.mkdir()
        path.write_text(CHECKERBOARD.replace("0, slots", kept))
    assert get_strategy(f"{first}:checkerboard")(GUIDES, 0.5).tolist() == [[0, 2]]
    assert get_strategy(f"{second}:checkerboard")(GUIDES, 0.5).tolist() == [[1, 3]]
    before = strategy_digests([f"{first}:checkerboard", "tube"])
    first.write_text(second.read_text())
    monkeypatch.setattr(registry, "_found", {})  # as in another process
    assert get_strategy(f"{first}:checkerboard")(GUIDES, 0.5).tolist() == [[1, 3]]
    after = strategy_digests([f"{first}:checkerboard", "tube"])
    assert before.keys() == after.keys() == {f"{first}:checkerboard"}
    assert before != after


@pytest.mark.parametrize(
    ("strategy", "error"),
    [
        ("nowhere.py:mine", r"nowhere\.py does not exist \(paths are relative to the working directory"),
        ("there.py:mine", r"there\.py registers no masking strategy 'mine'.*it registers: checkerboard"),
        ("there.py", r"there\.py:NAME"),
    ],
)
def test_a_wrong_path_or_name_is_an_error_that_says_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str, error: str
) -> None:
    (tmp_path / "there.py").write_text(CHECKERBOARD)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=error):
        get_strategy(strategy)


# ------------------------------------------------------------------------------------------------- installed packages


def test_an_installed_package_brings_strategies_by_entry_points(tmp_path: Path) -> None:
    """A package is a folder with metadata beside it, as pip installs it. It is imported only where it is used."""
    (tmp_path / "fine").mkdir()
    (tmp_path / "fine" / "__init__.py").write_text("")
    (tmp_path / "fine" / "masks.py").write_text(CHECKERBOARD)
    (tmp_path / "failing").mkdir()
    (tmp_path / "failing" / "__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "failing" / "masks.py").write_text(CHECKERBOARD.replace('"checkerboard"', '"stripes"'))
    points = {"checkerboard": "fine.masks", "stripes": "failing.masks", "gone": "nowhere.masks"}
    metadata = tmp_path / "strangers-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: strangers\nVersion: 1.0\n")
    lines = [f"{name} = {module}" for name, module in points.items()]
    (metadata / "entry_points.txt").write_text("\n".join(["[stm.masking]", *lines]) + "\n")
    code = """
import sys
from stm.config import Mask
from stm.config.strategies import find_strategy

print(find_strategy("checkerboard").needs, find_strategy("stripes").needs, "torch" in sys.modules)
Mask(strategy="checkerboard")

import torch
from stm.masking import get_strategy, strategy_digests, strategy_names

print({*strategy_names()} >= {"checkerboard", "stripes", "gone", "tube"})
print(get_strategy("checkerboard")({"noise": torch.rand(1, 1, 4)}, 0.5).tolist())
print(list(strategy_digests(["checkerboard", "tube"])))
for name in ("stripes", "gone"):
    try:
        get_strategy(name)
    except ValueError as error:
        print(error)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    declared, listed, kept, digests, failing, gone = run.stdout.splitlines()
    assert declared == "('motion',) ('motion',) False"
    assert (listed, kept, digests) == ("True", "[[0, 2]]", "['checkerboard']")
    assert "failing/masks.py" in failing and "RuntimeError: imported" in failing
    assert "the package strangers" in gone and "nowhere.masks" in gone
