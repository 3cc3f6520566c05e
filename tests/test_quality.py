"""The house rules, held by tools: linters, types, import order, what may not stand in the code."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent

# From the bottom of the house to its top: each may import from itself and from those before it (docs/architecture.md).
ORDER: tuple[str, ...] = (
    "tubelets",
    "storage",
    "jobs",
    "distributed",
    "manifest",
    "shards",
    "config",
    "layout",
    "pretrained",
    "stages",
    "datasets",
)
ORDER += (
    "preprocess",
    "data",
    "masking",
    "objectives",
    "models",
    "methods",
    "training",
    "evaluation",
    "features",
    "plan",
    "report",
)
ORDER += ("api", "demo", "rehearsal", "cli", "__main__")
# What must not know each other although one stands before the other, and what nothing may import.
FORBIDDEN_IMPORTS = {"models": {"objectives", "preprocess"}, "data": {"preprocess"}, "methods": {"preprocess"}}
BESIDE_THE_ROAD = {"demo"}


def run(*command: str) -> None:
    finished = subprocess.run(
        [str(BIN / command[0]), *command[1:]], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, f"{' '.join(command)}\n{finished.stdout[-5000:]}{finished.stderr[-5000:]}"


def test_ruff_finds_nothing():
    run("ruff", "check", "--no-cache", ".")


def test_ruff_would_format_nothing():
    run("ruff", "format", "--no-cache", "--check", ".")


def test_snakefmt_would_format_nothing():
    run("snakefmt", "--check", "workflow")


def test_codespell_finds_nothing():
    run("codespell")


@pytest.mark.slow
def test_snakemake_lints_clean():
    run("snakemake", "--lint")


@pytest.mark.slow
def test_the_package_its_tests_and_the_benchmarks_type_check():
    run("mypy")


def imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" if node.module == "stm" else node.module for alias in node.names]
        rooms |= {name.split(".")[1] for name in names if name.startswith("stm.")}
    return rooms


@pytest.mark.parametrize("path", sorted((ROOT / "stm").rglob("*.py")), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_imports_point_one_way(path):
    room = path.relative_to(ROOT / "stm").parts[0].removesuffix(".py")
    if room == "__init__":  # for type checkers; at run time only when a name is used, see `test_import_stm_is_light`
        assert imported_rooms(path) == {"api"}
        return
    allowed = set(ORDER[: ORDER.index(room) + 1]) - FORBIDDEN_IMPORTS.get(room, set()) - (BESIDE_THE_ROAD - {room})
    assert imported_rooms(path) <= allowed, sorted(imported_rooms(path) - allowed)


def test_no_folder_of_the_package_is_crowded():
    folders = [folder for folder in (ROOT / "stm").rglob("*") if folder.is_dir()]
    crowded = {f.name: n for f in folders if (n := sum(p.name != "__init__.py" for p in f.glob("*.py"))) > 14}
    assert crowded == {}


def test_import_stm_is_light():
    heavy = "('torch', 'av', 'cv2', 'transformers', 'matplotlib', 'open_clip')"
    code = "import sys, stm, stm.config, stm.layout, stm.manifest, stm.cli, stm.datasets, stm.report,"
    code += "stm.training.launch, stm.evaluation.launch;"  # whoever only starts processes needs no torch
    code += f"print([m for m in {heavy} if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert loaded.strip() == "[]"


FORBIDDEN = {
    "unsafe load": re.compile(r"weights_only\s*=\s*False|\bimport pickle\b|\bpickle\.|yaml\.load\(|\beval\(|\bexec\("),
    "shell string": re.compile(r"shell\s*=\s*True|os\.system\("),
    "unfinished": re.compile("TO" + r"DO|FIX" + r"ME|NotImplemented" + "Error"),
}


@pytest.mark.parametrize("path", sorted((ROOT / "stm").rglob("*.py")), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_nothing_forbidden_stands_in_the_package(path):
    text = re.sub(r"\.eval\(\)", "", path.read_text())
    for name, pattern in FORBIDDEN.items():
        assert not pattern.search(text), name


def test_files_are_short_enough_to_read_in_one_sitting():
    long = {p.name: n for p in (ROOT / "stm").rglob("*.py") if (n := len(p.read_text().splitlines())) > 450}
    assert long == {}


AUTOMATION = sorted(p for p in (ROOT / ".github").rglob("*") if p.suffix in {".yml", ".yaml"})


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.M))


@pytest.mark.parametrize(
    "path", [*AUTOMATION, ROOT / ".pre-commit-config.yaml"], ids=lambda p: p.relative_to(ROOT).as_posix()
)
def test_automation_parses_and_calls_make_targets_that_exist(path):
    text = path.read_text()
    assert isinstance(yaml.safe_load(text), dict)
    assert set(re.findall(r"\bmake ([a-z-]+)", text)) <= make_targets()


def test_workflows_run_only_make_and_with_minimal_permissions():
    commands = set()
    for path in (ROOT / ".github/workflows").glob("*.yml"):
        workflow = yaml.safe_load(path.read_text())
        assert workflow["permissions"] == {"contents": "read"}, path.name
        for job in workflow["jobs"].values():
            assert "permissions" not in job, path.name
            commands |= {step["run"] for step in job["steps"] if "run" in step}
    assert commands == {f"make {target}" for target in ("lint", "test-quick", "test", "demo")}


def test_pre_commit_runs_the_locked_versions():
    repos = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    revisions = {Path(repo["repo"]).name.removesuffix("-pre-commit"): repo["rev"] for repo in repos}
    lock = dict(re.findall(r"^([a-z-]+)==(\S+)", (ROOT / "requirements.lock").read_text(), re.M))
    assert {"ruff", "snakefmt", "codespell"} <= revisions.keys()
    assert {name: f"v{lock[name]}" for name in revisions if name in lock} == {
        name: revision for name, revision in revisions.items() if name in lock
    }


def test_shipped_assets_are_small():
    total = sum(p.stat().st_size for p in (ROOT / "stm/assets").rglob("*") if p.is_file())
    assert 0 < total <= 10 * 2**20


def test_no_path_of_a_machine_and_no_registry_host_stands_in_the_repository():
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    pattern = re.compile("(?<![.A-Za-z0-9])/(wo" + "rk|fa" + "rm|ro" + "ot)/|index" + "-url|trusted" + "-host")
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path.suffix in {".png", ".safetensors", ".lock"} or not path.is_file() or path.is_symlink():
            continue
        assert not pattern.search(path.read_text(encoding="utf-8", errors="replace")), name
