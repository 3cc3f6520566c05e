"""Reference results: tables and figures of finished studies, which others can compare theirs with (`stm compare`).

A reference is a results folder without its data: `provenance.json`, `tables/` and `figures/`, as the report wrote them. Those
that come with stm are in `results/reference/`, under the names of their configs.
"""

import csv
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from stm.config import Config, parse_config
from stm.layout import Layout
from stm.report.clips.film_strips import encode_image
from stm.report.names import table_names
from stm.report.paper.tables import csv_header
from stm.report.results.provenance import write_provenance
from stm.report.tables import results_table
from stm.storage.files import read_json, write_bytes
from stm.storage.shipped import NotShippedError, shipped

FOLDER = "results/reference"
FIGURE_BYTES = 1_000_000  # of all figures of a reference together
_WRITE_AGAIN = "remove it and make the report again, with `stm report` or `snakemake`"
_CONTENTS = frozenset({"provenance.json", "tables", "figures"})
# The folders of a path, such as `/home/me/` of `/home/me/videos`, or a URL. The slashes of `top-1/top-5` and `models/clip`, which
# say nothing about a machine, are neither.
_FOLDERS = re.compile(
    r"""\b(?!file:)\w+://\S*|(?<![\w.~/\\])(?:~[^\s/]*/+(?:[^\s/"',|;<>]+/+)*|/+(?:[^\s/"',|;<>]+/+)+)(?=[^\s/])|\A/+"""
)
LARGE = 200_000  # bytes of a figure above which it is kept at half its width and height: only figures of clips are


class ComparisonError(ValueError):
    """Results that are not there, or not complete enough to be a reference; the message says how to make them."""


def read_provenance(folder: Path) -> dict[str, Any]:
    """Read the provenance of a results folder, with a config and an environment.

    Raises:
        ComparisonError: there is none, or it is damaged.
    """
    path = Layout(folder).provenance
    if not path.is_file():
        raise ComparisonError(
            f"{folder}: has no {path.name}, which the report writes; run `snakemake` with the study's --configfile, or "
            "`stm report` with its --config"
        )
    try:
        provenance: dict[str, Any] = read_json(path)
    except (ValueError, RecursionError) as error:
        raise ComparisonError(f"{path}: is not JSON ({error}); {_WRITE_AGAIN}") from error
    for key in ("config", "environment"):
        if not isinstance(provenance, dict) or not isinstance(provenance.get(key), dict):
            raise ComparisonError(f"{path}: has no object `{key}`; {_WRITE_AGAIN}")
    return provenance


def read_rows(path: Path) -> tuple[list[str], list[list[str]]]:
    """Read the header and the rows of a CSV table, which are as long as the header.

    Raises:
        ComparisonError: it is empty or damaged; the message names the file and the line.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = next(reader, [])
            rows = []
            for row in reader:
                if len(row) != len(header):
                    line = f"line {reader.line_num} has {len(row)} cells instead of {len(header)}"
                    raise ComparisonError(f"{path}: {line}; {_WRITE_AGAIN}")
                rows.append(row)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ComparisonError(f"{path}: is not a CSV table in UTF-8 ({error}); {_WRITE_AGAIN}") from error
    if not header:
        raise ComparisonError(f"{path}: is empty; {_WRITE_AGAIN}")
    return header, rows


def references() -> dict[str, Path]:
    """Return the folders of the references that come with stm by name: of the results, and of the config (`demo`)."""
    try:
        folders = sorted(path.parent for path in shipped(FOLDER).glob("*/provenance.json"))
    except NotShippedError:
        return {}
    found = {folder.name: folder for folder in folders}
    files = {folder: read_provenance(folder).get("file") for folder in folders}
    return found | {file: folder for folder, file in files.items() if isinstance(file, str)}


def find_reference(name: str, folders: bool = True) -> Path:
    """Return the folder of a reference, given its name or its path.

    Args:
        folders: whether the name may be a path.

    Raises:
        ComparisonError: there is none of this name.
    """
    known = references()
    if name in known:
        return known[name]
    if folders and Path(name).is_dir():
        return Path(name)
    raise ComparisonError(
        f"no reference results of {name!r}; there are: {', '.join(known) or 'none'}. Name one of them, or a results folder, "
        "with --with"
    )


def keep_reference(results: Path, target: Path | None = None) -> Path:
    """Copy tables, figures and provenance of finished results; what was in the target is replaced.

    Args:
        results: the results folder of a config, with its report.
        target: the folder to write; by default `reference/{name}` beside the results.

    Returns:
        The folder. Figures of clips are halved; if all are larger than `FIGURE_BYTES` together, the largest are left out and
        listed in its `provenance.json` as `figures_left_out`. Of paths on this machine, the last name is kept.

    Raises:
        ComparisonError: results are missing, or the target is something else.
    """
    provenance = read_provenance(results)
    config = parse_config(provenance["config"], str(Layout(results).provenance))
    if problems := shape_problems(results, config):
        raise ComparisonError(f"{results} is not complete: {'; '.join(problems)}; run `snakemake` with the same config")
    target = target or results.absolute().parent / "reference" / results.absolute().name
    _check_target(results, target)
    # Everything is read before anything is removed.
    texts = {f"tables/{name}": _read_text(Layout(results).tables / name) for name in _kept_tables(config)}
    figures, left_out = _choose_figures(Layout(results).figures)
    described = {**provenance, **({"figures_left_out": left_out} if left_out else {})}
    for folder in (Layout(target).tables, Layout(target).figures):
        if folder.exists():
            shutil.rmtree(folder)
    for name, data in {**texts, **figures}.items():
        write_bytes(target / name, data)
    write_provenance(Layout(target).provenance, without_folders(described))
    return target


def _check_target(results: Path, target: Path) -> None:
    """Refuse to replace anything but a reference: results that took days may lie in a folder of the same form."""
    if target.resolve() == results.resolve():
        raise ComparisonError(f"{target}: a reference is a copy; name another folder with --out")
    if not target.exists() and not target.is_symlink():
        return
    if not Layout(target).provenance.is_file():
        raise ComparisonError(
            f"{target}: has no provenance.json, so it is not a reference to replace; name another with --out"
        )
    others = sorted(path.name for path in target.iterdir() if path.name not in _CONTENTS)
    if others:
        raise ComparisonError(
            f"{target}: has {', '.join(others[:3])}{', ...' if len(others) > 3 else ''}, which no reference has, and is not "
            "replaced; name another folder with --out"
        )


def _kept_tables(config: Config) -> list[str]:
    """The file names of the tables that the config makes; what else is in `tables/` is of an earlier config."""
    return [*table_names(config), *(f"{name}.{ending}" for name in config.tables for ending in ("csv", "md"))]


def _read_text(path: Path) -> bytes:
    """Read a table, without the folders in messages about videos that were refused."""
    try:
        text: str = without_folders(path.read_bytes().decode())
    except FileNotFoundError:
        raise ComparisonError(f"there is no {path}; make the report again, with `stm report` or `snakemake`") from None
    except UnicodeDecodeError as error:
        raise ComparisonError(f"{path}: is not UTF-8 ({error}); {_WRITE_AGAIN}") from error
    return text.encode()


def _choose_figures(folder: Path) -> tuple[dict[str, bytes], list[str]]:
    """The figures of a reference, the smallest first, and the names of those that are left out."""
    figures = sorted(map(_shrink, folder.glob("*.png")), key=lambda figure: (len(figure[1]), figure[0]))
    total, chosen, left_out = 0, {}, []
    for name, data in figures:
        total += len(data)
        if total > FIGURE_BYTES:
            left_out.append(name)
        else:
            chosen[f"figures/{name}"] = data
    return chosen, left_out


def without_folders(value: Any) -> Any:
    """Return a JSON value whose paths, such as `/home/me/videos` and `local-dir:~/clip`, are reduced to their last name.

    URLs are kept, except those of files.
    """
    if isinstance(value, Mapping):
        return {key: without_folders(part) for key, part in value.items()}
    if isinstance(value, list):
        return [without_folders(part) for part in value]
    if isinstance(value, str):
        return _FOLDERS.sub(lambda match: match[0] if "://" in match[0] else "", value)
    return value


def _shrink(path: Path) -> tuple[str, bytes]:
    """Return the name and the bytes of a figure; a large one is halved, and encoded as the page's images are."""
    if path.stat().st_size <= LARGE:
        return path.name, path.read_bytes()
    with Image.open(path) as image:
        half = image.convert("RGB").resize(
            (max(1, image.width // 2), max(1, image.height // 2)), Image.Resampling.LANCZOS
        )
    media_type, data = encode_image(half)
    return f"{path.stem}.{media_type.removeprefix('image/')}", data


def shape_problems(folder: Path, config: Config) -> list[str]:
    """Compare the tables of a results folder with what its config makes today: files, columns, rows and seeds.

    Returns:
        What differs, one sentence each; empty if nothing does.
    """
    names = [name for name in table_names(config) if name.endswith(".csv")] + [f"{name}.csv" for name in config.tables]
    problems = []
    for name in names:
        path = Layout(folder).tables / name
        if not path.is_file():
            problems.append(f"there is no tables/{name}")
            continue
        header, rows = read_rows(path)
        problems += [f"tables/{name}: {problem}" for problem in _compare_shape(config, path.stem, header, rows)]
    return problems


def _compare_shape(config: Config, table: str, header: list[str], rows: list[list[str]]) -> list[str]:
    """What differs in one table whose columns and rows depend on the config alone."""
    if table == "results":
        expected = results_table(config, [], {}).keys
        names = list(config.pretrain)
        runs = {(name, task): name for task in config.evaluate for name in config.runs_of(task)}
        columns: list[str] = list(config.evaluate)
    elif table in config.tables:
        spec = config.tables[table]
        expected = csv_header(spec)
        names = [row.label for row in spec.rows]
        columns = [str(number) for number in range(len(spec.columns))]
        runs = {(row.label, i): run for row in spec.rows for i in columns if (run := row.run_of(int(i))) is not None}
    else:
        return []
    if header != expected:
        missing = [key for key in expected if key not in header]
        return [f"its columns are others than the config's{', such as ' + missing[0] if missing else ''}"]
    found = [row[0] for row in rows if row[0] != "chance"]
    if found != names:
        return [f"its rows are {', '.join(found)} instead of {', '.join(names)}"]
    places = [number for number, key in enumerate(header) if key.endswith("_seeds")]
    problems = []
    for row in rows[: len(names)]:
        for column, place in zip(columns, places, strict=True):
            run = runs.get((row[0], column))
            seeds = str(len(config.instances(run))) if run else ""
            if row[place] != seeds:
                problems.append(f"{row[0]} has {row[place] or 'no'} instead of {seeds or 'no'} {header[place]}")
    return problems
