"""Damaged annotations and configs lead to an error that names the file, or to rows in the quarantine."""

import csv
import io
import json
import warnings
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml
from damage import damage_bytes, damage_table
from synthetic_videos import make_pan, make_video
from trial import Tally, deadline, run_here, snapshot

import stm.datasets.probe_pool
from stm.cli import main
from stm.config import parse_config
from stm.datasets import build_manifest
from stm.datasets.annotations import COLUMNS, AnnotationError
from stm.datasets.folder import DatasetError
from stm.manifest import QUESTIONS
from stm.storage.tables import read_table, write_table

COUNTS = pytest.mark.parametrize("count", [25, pytest.param(240, marks=pytest.mark.slow)])

ANNOTATIONS: list[dict[str, Any]] = [
    {
        "path": "a.mp4",
        "video_id": "a",
        "split": "train",
        "label": "x",
        "captions": ["one", "two"],
        "start": 0.0,
        "end": 0.4,
    },
    {
        "path": "b.mp4",
        "video_id": "b",
        "split": "test",
        "label": "y",
        "captions": ["three"],
        "start": None,
        "end": None,
    },
]


@COUNTS
@pytest.mark.parametrize("ending", ["csv", "json", "jsonl", "parquet"])
def test_damaged_annotations(
    ending: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    table: Callable[[Tally], None],
) -> None:  # fmt: skip
    """Each run writes tables with every row, or raises an error that names the file."""
    monkeypatch.setattr(stm.datasets.probe_pool, "run_isolated", run_here)
    root, file = tmp_path / "videos", tmp_path / f"clips.{ending}"
    root.mkdir()
    for name in ("a.mp4", "b.mp4"):
        make_video(root / name, make_pan(frames=4, width=64, height=48))
    original = write_annotations(file)
    damages = damage_bytes(original, np.random.default_rng(0))
    cases = list(islice(damages, count // 2 if ending == "parquet" else count))
    if ending == "parquet":
        tables = damage_table(original)
        order = np.random.default_rng(0).permutation(len(tables))
        cases += [tables[number] for number in order[: count - len(cases)]]
        cases += list(islice(damages, count - len(cases)))
    tally, before = Tally(f"manifest, {ending}"), None
    for number, damage in enumerate(cases):
        file.write_bytes(damage.data)
        output = tmp_path / "outputs" / str(number)
        before = snapshot(tmp_path, tmp_path / "outputs")
        try:
            with deadline(), warnings.catch_warnings(action="ignore"):
                refused = build(root, file, output)
            tally.add("rows refused" if refused else "no damage detected")
            assert all(row["detail"] for row in refused)
        except (AnnotationError, DatasetError) as error:
            tally.add("refused by name")
            assert str(file) in str(error) or str(root) in str(error), damage.kind
        assert snapshot(tmp_path, tmp_path / "outputs") == before
    table(tally)
    assert tally.total == count


def build(root: Path, annotations: Path, output: Path) -> list[dict[str, Any]]:
    """Build a manifest and return the rows of the quarantine."""
    dataset = {"source": "folder", "root": str(root), "annotations": str(annotations)}
    config = parse_config({"name": "x", "dataset": dataset, "bad_input": {"max_failure_rate": 1.0}})
    build_manifest(config, None, output / "manifest.parquet", output / "quarantine.parquet", processes=1)
    refused: list[dict[str, Any]] = read_table(output / "quarantine.parquet").to_pylist()
    return refused


def write_annotations(file: Path) -> bytes:
    """The annotations in the format of the file's extension."""
    if file.suffix == ".parquet":
        types = dict.fromkeys(COLUMNS, pa.string()) | {"start": pa.float64(), "end": pa.float64()}
        types |= {"captions": pa.list_(pa.string()), "questions": QUESTIONS}
        schema = pa.schema([(name, types[name]) for name in COLUMNS if name != "caption"])
        write_table(file, pa.Table.from_pylist(ANNOTATIONS, schema), {})
        return file.read_bytes()
    if file.suffix == ".csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, list(ANNOTATIONS[0]))
        writer.writeheader()
        writer.writerows(row | {"captions": "|".join(row["captions"])} for row in ANNOTATIONS)
        return text.getvalue().encode()
    if file.suffix == ".json":
        return json.dumps(ANNOTATIONS).encode()
    return "".join(json.dumps(row) + "\n" for row in ANNOTATIONS).encode()


# Eight levels of ten references each: expanded, a hundred million entries.
BOMB = "a: &a [x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
CONFIGS = [
    BOMB + "dataset: *i\n", BOMB + "pretrain: {a: *i}\n", "[" * 1500, "{a: " * 2000, "a: !!python/object/apply:os.system [id]\n",
    "name: ../../outside\n", "name: /etc\n", "results: 5\n", "shard_size: 99999999999999999999999\n", "grid: .nan\n",
    "? [a, b]\n: c\n", "1: 2\n", "null: 3\n", "a: &a\n  b: *a\n", "\0", "\t", "--- a\n--- b\n", "name: [1, 2\n",
    "%YAML 9.9\n---\na: 1\n",
]  # fmt: skip


@COUNTS
def test_damaged_configs(
    count: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], table: Callable[[Tally], None]
) -> None:
    """Each ends with exit status 2 and a message that names the config or, if the damage changes nothing, the manifest."""
    file, tally = tmp_path / "config.yaml", Tally("config")
    original = yaml.safe_dump(
        {"name": "x", "results": str(tmp_path / "results"), "dataset": {"source": "folder", "root": "none"}, "grid": 7,
         "captions": {"human": {"kind": "human"}}, "frames": {"every": 2}, "bad_input": {"policy": {"truncated": "drop"}}}
    ).encode()  # fmt: skip
    cases = [text.encode() for text in CONFIGS]
    cases += [damage.data for damage in islice(damage_bytes(original, np.random.default_rng(0)), count - len(cases))]
    for data in cases:
        file.write_bytes(data)
        with deadline():
            code = main(["split", "--config", str(file)])
        printed = capsys.readouterr().err
        assert code == 2 and ("config.yaml" in printed or "manifest" in printed), (data[:200], printed)
        tally.add("refused by name" if "config.yaml" in printed else "no damage detected")
        assert {path.name for path in tmp_path.iterdir()} <= {"config.yaml"}
    table(tally)
