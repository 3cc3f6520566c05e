"""Everything that README and docs name exists: modules, files, make targets, commands, rules, config keys, links."""

import argparse
import ast
import importlib
import json
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from stm.cli import build_parser
from stm.cli.init import CONFIG
from stm.config import load_config

ROOT = Path(__file__).parents[1]
DOCS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "stm/assets/README.md")]
DOCS += [ROOT / "config/README.md", *sorted((ROOT / "docs").rglob("*.md"))]

FOLDERS = "stm|docs|tests|config|workflow|benchmarks"
NEW_STUDY = {CONFIG}  # files that `stm init` writes, not of the repository
FILES = re.compile(r"\.(py|md|ya?ml|json|toml|smk|parquet|safetensors|tar|csv|html|npy|jpg|pth|db)$")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)

docs = pytest.mark.parametrize("path", DOCS, ids=lambda path: path.relative_to(ROOT).as_posix())


@cache
def code_of(path: Path) -> list[str]:
    """The fenced blocks and the code spans of a document."""
    text = path.read_text()
    blocks = [block for _, block in FENCE.findall(text)]
    return blocks + re.findall(r"`([^`\n]+)`", FENCE.sub("", text))


def named(path: Path, pattern: str) -> set[str]:
    """What `pattern`'s group matches in the code of a document."""
    return {name for code in code_of(path) for name in re.findall(pattern, code)}


def exists(name: str) -> bool:
    """Whether a dotted name is a module, or an attribute of one."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError as error:
            # A package that is missing within an existing module is no reason to look for a shorter name.
            if error.name is None or not name.startswith(error.name):
                raise
            continue
        for part in parts[length:]:
            found = getattr(found, part, None)
        return found is not None
    return False


@docs
def test_dotted_names_are_modules_or_their_attributes(path):
    names = {name for name in named(path, r"(?<![\w./-])(stm(?:\.\w+)+)") if not FILES.search(name)}
    assert {name for name in names if not exists(name)} == set()


@docs
def test_imports_in_examples_work(path):
    blocks = [block for language, block in FENCE.findall(path.read_text()) if language == "python"]
    nodes = [node for block in blocks for node in ast.walk(ast.parse(block)) if isinstance(node, ast.ImportFrom)]
    names = {f"{node.module}.{alias.name}" for node in nodes for alias in node.names}
    assert {name for name in names if not exists(name)} == set()


@docs
def test_paths_of_the_repository_exist(path):
    names = named(path, rf"(?<![\w./{{}}~-])((?:{FOLDERS})/[\w./*{{}},-]*)") - NEW_STUDY
    # `{source}` and `NAME` stand for any name.
    patterns = {name: re.sub(r"\{[^}]*\}|\bNAME\b", "*", name.rstrip(".,/")) for name in names}
    assert {name for name, pattern in patterns.items() if not list(ROOT.glob(pattern))} == set()


@docs
def test_links_lead_to_files_and_headings(path):
    text = FENCE.sub("", path.read_text())
    broken = set()
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", link):
            continue
        target, _, heading = link.partition("#")
        file = path.parent / target if target else path
        if not file.is_file() or (heading and heading not in headings(file)):
            broken.add(link)
    assert broken == set()


def headings(path: Path) -> set[str]:
    """The anchors that GitHub makes of a document's headings."""
    titles = re.findall(r"^#+ (.+)$", FENCE.sub("", path.read_text()), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@docs
def test_make_targets_exist(path):
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.M))
    assert named(path, r"\bmake ([a-z][a-z-]*)") <= targets


def commands() -> set[str]:
    (action,) = (a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return set(action.choices)


@docs
def test_commands_exist(path):
    assert named(path, r"(?:^|(?<=[\s/]))stm ([a-z][a-z_-]*)") <= commands()


def test_every_command_is_documented():
    assert commands() == named(ROOT / "docs/commands.md", r"^stm ([a-z][a-z-]*)")


@cache
def papers() -> set[str]:
    """The tables and figures of the configs, which are targets by their names."""
    configs = [load_config(path) for path in (ROOT / "config").glob("*.yaml")]
    return {name for config in configs for name in (*config.tables, *config.figures)}


@docs
def test_rules_that_snakemake_is_asked_for_exist(path):
    sources = [ROOT / "workflow/Snakefile", *(ROOT / "workflow/rules").glob("*.smk")]
    rules = {name for file in sources for name in re.findall(r"^(?:rule|checkpoint) (\w+)", file.read_text(), re.M)}
    assert named(path, r"\bsnakemake ([a-z]\w*)(?![\w/.-])") <= rules | papers()


@cache
def schema() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((ROOT / "config/schema.json").read_text())
    return loaded


def objects(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The objects that a value described by `node` may be."""
    if "$ref" in node:
        yield from objects(schema()["$defs"][node["$ref"].rsplit("/", 1)[1]])
    for kind in ("anyOf", "oneOf", "allOf"):
        for option in node.get(kind, ()):
            yield from objects(option)
    if "properties" in node or "patternProperties" in node or isinstance(node.get("additionalProperties"), dict):
        yield node


def children(nodes: list[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    """The descriptions of `key` in any of the objects that the nodes may be."""
    found = []
    for node in (one for described in nodes for one in objects(described)):
        if key in node.get("properties", {}):
            found.append(node["properties"][key])
        else:
            # A mapping by names of the user's, of runs for instance.
            found += [n for pattern, n in node.get("patternProperties", {}).items() if re.search(pattern, key)]
            if isinstance(node.get("additionalProperties"), dict):
                found.append(node["additionalProperties"])
    return found


def sections() -> dict[str, list[dict[str, Any]]]:
    """Where a key may be written without its section: at the top of a config, or in a dataset, run or evaluation."""
    found: dict[str, list[dict[str, Any]]] = {}
    for node in [schema(), *schema()["$defs"].values()]:
        for key, child in node.get("properties", {}).items():
            found.setdefault(key, []).append(child)
    return found


@docs
def test_dotted_config_keys_exist(path):
    known, unknown = sections(), set()
    for name in named(path, r"^((?:[a-z_]+\.)+[a-z_]+)(?::.*)?$"):
        first, *rest = name.split(".")
        nodes = known.get(first, [])
        if FILES.search(name) or not any(True for node in nodes for _ in objects(node)):
            continue
        for key in rest:
            nodes = children(nodes, key)
        if not nodes:
            unknown.add(name)
    assert unknown == set()


def dotted_keys(value: Any, prefix: str = "") -> Iterator[str]:
    for key, child in value.items() if isinstance(value, dict) else ():
        # `extends` is resolved before a config is checked, so the schema does not contain it.
        if key != "extends":
            yield f"{prefix}{key}"
            yield from dotted_keys(child, f"{prefix}{key}.")


@docs
def test_keys_of_example_configs_exist(path):
    blocks = [block for language, block in FENCE.findall(path.read_text()) if language == "yaml"]
    names = {name for block in blocks for name in dotted_keys(yaml.safe_load(block))}
    unknown = set()
    for name in names:
        nodes = [schema()]
        for key in name.split("."):
            nodes = children(nodes, key)
        if not nodes:
            unknown.add(name)
    assert unknown == set()


def test_the_checks_notice_what_does_not_exist(tmp_path):
    """Each check fails on a document that names something that does not exist."""
    document = tmp_path / "wrong.md"
    document.write_text(
        "`stm.storage.tables.read_recipe`, `stm/storage/gone.py`, `make coffee`, `stm brew`, `snakemake brew`, "
        "`bad_input.polici`, [link](gone.md)\n\n```python\nfrom stm.masking import no_such_name\n```\n"
        "```yaml\nframes: {evry: 4}\n```\n"
    )
    checks = (
        test_dotted_names_are_modules_or_their_attributes,
        test_imports_in_examples_work,
        test_paths_of_the_repository_exist,
        test_links_lead_to_files_and_headings,
        test_make_targets_exist,
        test_commands_exist,
        test_rules_that_snakemake_is_asked_for_exist,
        test_dotted_config_keys_exist,
        test_keys_of_example_configs_exist,
    )
    for check in checks:
        with pytest.raises(AssertionError):
            check(document)


# Packages whose import names differ from their own.
IMPORTED_AS = {
    "decord2": "decord",
    "ffmpeg-python": "ffmpeg",
    "imageio-ffmpeg": "imageio_ffmpeg",
    "mlflow-skinny": "mlflow",
    "open_clip_torch": "open_clip",
    "opencv-python-headless": "cv2",
    "pillow": "PIL",
    "pyyaml": "yaml",
}


def package_rows() -> list[tuple[list[str], str]]:
    """The packages and the places of each row of docs/packages.md."""
    rows = re.findall(r"^\| ([a-z][^|]+) \| [^|]+ \| ([^|]*) ?\|$", (ROOT / "docs/packages.md").read_text(), re.M)
    return [(re.findall(r"[\w-]+", re.sub(r"\([^)]*\)", "", names)), places) for names, places in rows[1:]]


def required_packages() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {
        name: packages for name, packages in project["optional-dependencies"].items() if name not in ("dev", "docs")
    }
    lines = [*project["dependencies"], *(line for packages in extras.values() for line in packages)]
    return {re.split(r"[\[<>=~!; ]", line)[0] for line in lines} - {project["name"]}


@cache
def importers() -> dict[str, set[str]]:
    """For each top-level module, the files of stm/ that import it, apart from those that make small models (see the page)."""
    found: dict[str, set[str]] = {}
    for path in (ROOT / "stm").rglob("*.py"):
        if path.relative_to(ROOT / "stm").parts[0] in ("demo", "rehearsal"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for name in names:
                found.setdefault(name.split(".")[0], set()).add(path.relative_to(ROOT).as_posix())
    return found


def test_every_required_package_is_explained():
    explained = {name for names, _ in package_rows() for name in names}
    assert required_packages() - explained == {"s3fs"}  # which fsspec imports, and whose row names it
    assert explained - required_packages() == set()


@pytest.mark.parametrize(("names", "places"), [row for row in package_rows() if "everywhere" not in row[1]])
def test_packages_are_imported_where_the_docs_say_and_nowhere_else(names, places):
    named = set(re.findall(r"`(stm/[\w./]*)`", places))
    for name in names:
        files = importers().get(IMPORTED_AS.get(name, name), set())
        assert {file for file in files if not any(file.startswith(place) for place in named)} == set(), name
    if any(importers().get(IMPORTED_AS.get(name, name)) for name in names):
        used = {file for name in names for file in importers().get(IMPORTED_AS.get(name, name), set())}
        assert {place for place in named if not any(file.startswith(place) for file in used)} == set()
