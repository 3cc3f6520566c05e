"""The pages of docs/methods: tests, targets, config keys, settings and published numbers that they name are the repository's.

Two kinds of tables are compared with a config. A table after a line "Keys of `config/x.yaml`, below `pretrain.run`" has the
columns "key" and "value". A table after a line "Published, table `name` of `config/x.yaml`" repeats rows of that table.
"""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from stm.config import Config, load_config
from stm.report.paper.tables import MARKS

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs/methods").glob("*.md"))
METHODS = ("videomae", "mgm", "mgmae", "umt", "tgm", "stm", "clusterstm")
SECTIONS = [
    "Settings and their sources",
    "In this repository",
    "What is compared with what",
    "What the sources leave open",
    "Where sources and code disagree",
    "Not known, not reproduced",
    "Licence",
    "Citation",
]
# Where a statement was read (as in the report's tables), and what has no source.
CERTAINTIES = {mark for certainty, (mark, _) in MARKS.items() if certainty} | {"△", "□", "?"}

KEYS = re.compile(r"^Keys of \[`(config/[\w./-]+)`\]\([^)]+\)(?:, below `([\w.-]+)`)?")
PUBLISHED = re.compile(r"^Published, table `(\w+)` of \[`(config/[\w./-]+)`\]")

pages = pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)


class Block(NamedTuple):
    """A Markdown table and the line before it."""

    line: str
    header: list[str]
    rows: list[list[str]]

    def column(self, name: str) -> list[str]:
        return [row[self.header.index(name)] for row in self.rows]


def tables(path: Path) -> Iterator[Block]:
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.M | re.S)
    for line, table in re.findall(r"^(.+)\n\n((?:\|.*\n)+)", text, re.M):
        header, _, *rows = ([cell.strip() for cell in row.strip().strip("|").split("|")] for row in table.splitlines())
        assert {len(row) for row in rows} == {len(header)}, f"{path.name}: a row of another length, below {header}"
        yield Block(line, header, rows)


def spans(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


@cache
def config(name: str) -> Config:
    return load_config(ROOT / name)


@cache
def values(name: str) -> dict[str, Any]:
    dumped: dict[str, Any] = config(name).model_dump(mode="json")
    return dumped


def look_up(name: str, prefix: str | None, key: str) -> Any:
    """The value of a key of a config, looked for below the prefix and then in the whole file."""
    for start in [f"{prefix}.{key}"] * bool(prefix) + [key]:
        value: Any = values(name)
        try:
            for part in start.split("."):
                value = value[part]
        except (KeyError, TypeError):
            continue
        return value
    raise AssertionError(f"{name} has no {key}, nor one below {prefix}")


def test_each_method_has_a_page_and_the_index_links_to_all() -> None:
    assert {path.stem for path in PAGES} == {"index", *METHODS}
    index = (ROOT / "docs/methods/index.md").read_text()
    assert [name for name in METHODS if f"]({name}.md)" not in index] == []


@pytest.mark.parametrize("name", METHODS)
def test_the_pages_have_the_same_sections(name: str) -> None:
    text = (ROOT / f"docs/methods/{name}.md").read_text()
    assert re.findall(r"^## (.+)$", text, re.M) == SECTIONS
    assert re.search(r"^```bibtex\n@\w+\{\w+,$", text, re.M)


@pages
def test_settings_are_those_of_the_config(path: Path) -> None:
    compared, wrong = 0, []
    for block in tables(path):
        found = KEYS.match(block.line)
        assert bool(found) == ("key" in block.header), f"before a table with keys: 'Keys of ...', not {block.line!r}"
        if not found:
            continue
        name, prefix = found.groups()
        for keys, given in zip(block.column("key"), block.column("value"), strict=True):
            for key, value in zip(spans(keys), spans(given), strict=True):
                compared += 1
                if (expected := look_up(name, prefix, key)) != yaml.safe_load(value):
                    wrong.append(f"{key} is {expected}, the page says {value}")
    assert wrong == []
    assert compared or path.stem == "index"


@pages
def test_published_numbers_are_those_of_the_config(path: Path) -> None:
    for block in tables(path):
        if not (found := PUBLISHED.match(block.line)):
            continue
        spec = config(found[2]).tables[found[1]]
        titles = [column.title for column in spec.columns]
        labels = {row.label: row for row in spec.rows}
        for label, *cells in block.rows:
            for title, cell in zip(block.header[1:], cells, strict=True):
                number, certainty = spec.published(labels[label], titles.index(title))
                expected = "?" if number is None else f"{number} {MARKS[certainty][0]}"
                assert cell == expected, f"{found[1]}, {label}, {title}"


@pages
def test_every_statement_has_a_mark_of_its_certainty(path: Path) -> None:
    for block in tables(path):
        if "certainty" in block.header:
            assert {
                cell for cell in block.column("certainty") if not set(cell.split()) <= CERTAINTIES or not cell
            } == set()


@pages
def test_tests_exist(path: Path) -> None:
    named = set(re.findall(r"`(tests/[\w./-]+\.py)::(\w+)`", path.read_text()))
    assert {f"{file}::{name}" for file, name in named if name not in functions_of(file)} == set()
    assert named or path.stem == "index"


@cache
def functions_of(file: str) -> set[str]:
    tree = ast.parse((ROOT / file).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pages
def test_targets_are_of_the_config_beside_them(path: Path) -> None:
    for targets, name in re.findall(
        r"snakemake ([a-z][\w ]*?)(?: --cores \d+)? --configfile (\S+\.yaml)", path.read_text()
    ):
        known = {*config(name).tables, *config(name).figures, "plan", "rehearse"}
        assert set(targets.split()) <= known, name


@pages
def test_runs_exist(path: Path) -> None:
    """A run or evaluation that is named with its file, as in `config/tgm.yaml: pretrain.tube-k400`."""
    for name, key in re.findall(r"`(config/[\w./-]+\.yaml): ([\w.-]+)`", path.read_text()):
        look_up(name, None, key)


def test_the_checks_notice_what_is_wrong(tmp_path: Path) -> None:
    page = tmp_path / "wrong.md"
    page.write_text(
        "`tests/test_docs.py::test_gone`, `config/tgm.yaml: pretrain.gone`, "
        "`snakemake gone --cores 2 --configfile config/tgm.yaml`\n\n"
        "Keys of [`config/tgm.yaml`](x), below `pretrain.tube-k400`:\n\n"
        "| item | key | value | source | certainty |\n|---|---|---|---|---|\n| ratio | `mask.ratio` | `0.8` | | sure |\n\n"
        "Published, table `tgm_table1` of [`config/tgm.yaml`](x):\n\n"
        "| mask | SSv2, linear |\n|---|---|\n| TGM | 26.3 ◐ |\n"
    )
    checks = (
        test_settings_are_those_of_the_config,
        test_published_numbers_are_those_of_the_config,
        test_every_statement_has_a_mark_of_its_certainty,
        test_tests_exist,
        test_targets_are_of_the_config_beside_them,
        test_runs_exist,
    )
    for check in checks:
        with pytest.raises(AssertionError):
            check(page)
