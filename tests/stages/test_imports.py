"""What a job of each stage imports: a heavy package that it does not need costs every job up to three seconds."""

import ast
import inspect
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from stm.evaluation.tasks import TASKS
from stm.stages.declaration import Stage
from stm.stages.journey import all_stages

ROOT = Path(__file__).parents[2]
HEAVY = {"av", "cv2", "jinja2", "matplotlib", "open_clip", "pandas", "scipy", "sklearn", "snakemake", "timm", "torch"}
HEAVY |= {"torchvision", "transformers"}
NETWORKS = {"torch", "timm"}  # timm imports torchvision, and with it torch's compiler
# By stage: the heavy packages that each of its jobs imports. open_clip imports transformers, too.
HEAVY_OF: dict[str, set[str]] = {
    "demo_models": {*NETWORKS, "cv2", "open_clip", "transformers"},
    "plan": set(),
    "rehearse": {"av", "cv2", "timm", "torch"},
    "generate": {"cv2"},
    "manifest": set(),
    "split": set(),
    "frames": {"av"},
    "captions": set(),
    "embeddings": {"torch", "open_clip"},
    "joint_similarity": {"torch", "open_clip"},
    "similarity": {"torch", "open_clip"},
    "text": {"torch", "open_clip", "transformers"},
    "motion": {"av"},
    "flow": {"cv2"},
    "shards": set(),
    "pretrain": set(),
    "evaluate": set(),
    "mask_quality": {"torch", "cv2"},
    "crop_agreement": {"torch", "cv2", "av", "open_clip"},
    "table": set(),
    "figure": set(),
    "report": set(),
}
# The modules that functions of these stages import next; entries of TASKS are added below.
NEXT = {
    "stm.training.pretraining": {*NETWORKS, "cv2"},
    "stm.methods.mae": {*NETWORKS, "cv2"},
    "stm.report.page.write": {*NETWORKS, "cv2", "jinja2", "matplotlib"},
    "stm.report.paper.write": {"matplotlib"},
}
WITHOUT_TEXT_MODELS = ("linear", "finetune", "retrieval")


def file_of(module: str) -> Path | None:
    """The file of a module of this package; None for other names."""
    path = ROOT.joinpath(*module.split("."))
    files = (path / "__init__.py", path.with_suffix(".py"))
    return next((file for file in files if module.split(".")[0] == "stm" and file.is_file()), None)


def imports_of(tree: ast.AST, inside_functions: bool) -> Iterator[str]:
    """The names of all modules that a tree imports when it is executed, or when its functions are called."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif inside_functions or not (
            isinstance(node, ast.FunctionDef)
            or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        ):
            yield from imports_of(node, inside_functions)


@cache
def imports_on_load(file: Path) -> list[str]:
    """The names of all modules that a file imports when it is loaded."""
    return list(imports_of(ast.parse(file.read_text()), inside_functions=False))


def heavy_imports(modules: list[str]) -> set[str]:
    """The heavy packages that come with an import of these modules."""
    todo, visited, heavy = list(modules), set(), set()
    while todo:
        names = todo.pop().split(".")
        heavy |= HEAVY & {names[0]}
        for module in (".".join(names[:end]) for end in range(1, len(names) + 1)):
            file = file_of(module)
            if file is not None and module not in visited:
                visited.add(module)
                todo += imports_on_load(file)
    return heavy


def modules_of(stage: Stage) -> list[str]:
    """The module that declares a stage, and what the stage's function imports when it is called."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(stage.run)))
    called = [name for name in imports_of(tree, inside_functions=True) if file_of(name) is not None]
    return [stage.run.__module__, *called]


@pytest.mark.parametrize("stage", all_stages().values(), ids=lambda stage: stage.name)
def test_a_stage_imports_no_heavy_package_without_need(stage: Stage) -> None:
    assert heavy_imports(modules_of(stage)) == HEAVY_OF[stage.name]


@pytest.mark.parametrize("module", NEXT)
def test_pretraining_and_the_page_import_text_models_only_for_runs_with_text(module: str) -> None:
    assert heavy_imports([module]) == NEXT[module]


@pytest.mark.parametrize("task", WITHOUT_TEXT_MODELS)
def test_tasks_of_runs_without_a_text_model_import_none(task: str) -> None:
    assert heavy_imports([TASKS[task].function.partition(":")[0]]) == {*NETWORKS, "cv2"}


def test_the_stages_without_networks_load_no_torch() -> None:
    """For real, because a package of others may import torch, too."""
    stages = [stage for stage in all_stages().values() if not HEAVY_OF[stage.name] & {"torch", "matplotlib"}]
    modules = {name for stage in stages for name in modules_of(stage)}
    code = f"import sys, {', '.join(sorted(modules))}; print(sorted({HEAVY - {'av', 'cv2'}} & sys.modules.keys()))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert loaded.strip() == "[]"
