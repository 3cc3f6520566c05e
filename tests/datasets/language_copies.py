"""Small copies of corpora and benchmarks of videos with text: lists in the shared formats, empty files beside them."""

import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

import stm.datasets
from stm.config import Config, LanguageDataset
from stm.datasets import video_text
from stm.datasets.probe import probe_file
from stm.datasets.video_text.protocol import read_protocol


def write_list(path: Path, entries: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(entries), encoding="utf-8")


def write_table(path: Path, rows: Sequence[tuple[Any, Any]], column: str = "filename") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with sqlite3.connect(path) as connection:
        connection.execute(f"CREATE TABLE annos (id integer PRIMARY KEY, {column} text, caption text)")
        connection.executemany(f"INSERT INTO annos ({column}, caption) VALUES (?, ?)", rows)
    connection.close()


def build(config: Config, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Makes manifest and quarantine table; files are looked at in this process, to start others takes seconds."""

    def probe_here(
        paths: Sequence[Path], settings: Mapping[str, int], *_: Any
    ) -> Iterator[tuple[Path, dict[str, Any]]]:
        return ((path, probe_file(path, **settings)) for path in paths)

    monkeypatch.setattr(stm.datasets, "probe_files", probe_here)
    folder.mkdir(exist_ok=True)
    manifest, quarantine = folder / "manifest.parquet", folder / "quarantine.parquet"
    stm.datasets.build_manifest(config, None, manifest, quarantine, processes=1)
    return manifest, quarantine


def make_dataset(source: str, folder: Path, files: Sequence[str] = (), **more: Any) -> LanguageDataset:
    """The config of a copy below `folder`, with `files` in its root, all empty."""
    root, lists = folder / "root", folder / "lists"
    root.mkdir(parents=True, exist_ok=True)
    lists.mkdir(parents=True, exist_ok=True)
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return LanguageDataset(source=source, root=str(root), annotations=str(lists), **more)  # type: ignore[arg-type]


def make_benchmark(
    source: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    lists: Mapping[str, Any],
    files: Sequence[str],
    videos: Mapping[str, Any] | None = None,
    texts: Mapping[str, int | None] | None = None,
    **more: Any,
) -> LanguageDataset:
    """A copy whose sizes are taken for official; those of splits that are not given are taken for unknown."""
    protocol = read_protocol(source)
    for split, entries in lists.items():
        write_list(folder / "lists" / protocol.files[split][0], entries)
    unknown = dict.fromkeys(protocol.files)
    sizes = {"videos": unknown | dict(videos or {}), "texts": unknown | dict(texts or {})}
    monkeypatch.setattr(video_text, "read_protocol", lambda name: protocol.model_copy(update=sizes))
    return make_dataset(source, folder, files, **more)
