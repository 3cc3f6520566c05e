"""The rehearsal's copy of every dataset is read by the product as an official copy of which most files are missing."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest

import stm.datasets
from stm.config import BenchmarkSource, Config, CorpusSource, FolderDataset, ProtocolSource, parse_config
from stm.datasets import build_manifest, check_copy, video_text
from stm.datasets.actions import BENCHMARKS, read_benchmark
from stm.datasets.probe import probe_file
from stm.datasets.video_text import read_answers, read_language
from stm.datasets.video_text.protocol import read_protocol
from stm.manifest import MANIFEST_SCHEMA, QUARANTINE_SCHEMA
from stm.rehearsal.copies import lay_out as layouts
from stm.rehearsal.copies import video_text as written_lists
from stm.rehearsal.copies.lay_out import LaidOut, lay_out
from stm.rehearsal.shrink import shrink
from stm.storage.tables import read_table


def make_config(source: str, folder: Path, **more: Any) -> Config:
    data = {"source": source, "root": str(folder / "videos"), "annotations": str(folder / "lists"), **more}
    return parse_config({"name": "own", "dataset": data, "frames": {"min_frames": 1}})


def laid_out(config: Config, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Config, LaidOut]:
    """The rehearsed config, in whose folder the test then is."""
    small = shrink(config)
    made = lay_out(config, small, folder, ["train", "val"])
    assert made is not None
    monkeypatch.chdir(folder)
    return small, made


@pytest.fixture
def short_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    """Official numbers of a thousand instead of some hundred thousand."""
    for source, benchmark in BENCHMARKS.items():
        counts = {fold: dict.fromkeys(splits, 51 * 24) for fold, splits in benchmark.counts.items()}
        monkeypatch.setitem(BENCHMARKS, source, replace(benchmark, counts=counts))

    def read_short(name: str) -> Any:
        protocol = read_protocol(name)
        videos = {split: None if size is None else 60 for split, size in protocol.videos.items()}
        texts = {split: None if size is None else 900 if size != 60 else 60 for split, size in protocol.texts.items()}
        texts = {split: 60 if _one_text_per_video(protocol, split) and size else size for split, size in texts.items()}
        return protocol.model_copy(update={"videos": videos, "texts": texts, "about": {}})

    for module in (video_text, written_lists, layouts):
        monkeypatch.setattr(module, "read_protocol", read_short)


def _one_text_per_video(protocol: Any, split: str) -> bool:
    return protocol.videos[split] == protocol.texts[split]


@pytest.mark.parametrize("source", get_args(BenchmarkSource))
def test_the_copy_of_an_action_benchmark_is_official_and_partial(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short_lists: None
) -> None:
    small, made = laid_out(make_config(source, tmp_path), tmp_path / "out", monkeypatch)
    assert made.problem is None and not made.own_lists
    check_copy(small)
    copy = read_benchmark(small.dataset)  # type: ignore[arg-type]
    assert copy.report.is_official and not copy.report.is_complete and not copy.report.problems
    found = Counter(named.clip.split for named in copy.clips)
    first, other = copy.report.splits
    assert found[first] >= 9 and found[other] >= 4
    assert {named.clip.label for named in copy.clips if named.clip.split == other} <= {
        named.clip.label for named in copy.clips if named.clip.split == first
    }


@pytest.mark.parametrize("source", [*get_args(ProtocolSource), "webvid-2m", "cc3m", "coco"])
def test_the_copy_of_a_video_text_dataset_is_official_and_partial(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short_lists: None
) -> None:
    small, _ = laid_out(make_config(source, tmp_path), tmp_path / "out", monkeypatch)
    check_copy(small)
    copy = read_language(small.dataset)  # type: ignore[arg-type]
    assert copy.report.is_official and not copy.report.is_complete and not copy.report.problems
    assert all(counts.found >= 4 for counts in copy.report.splits.values())
    if source.endswith("-qa"):
        answers = set(read_answers(small.dataset))  # type: ignore[arg-type]
        assert {question.answer for named in copy.clips for question in named.clip.questions} <= answers


def test_lists_of_the_official_length_pass_the_real_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small, _ = laid_out(make_config("hmdb51", tmp_path), tmp_path / "out", monkeypatch)
    check_copy(small)
    splits = read_benchmark(small.dataset).report.splits  # type: ignore[arg-type]
    assert {split: counts.listed for split, counts in splits.items()} == {"train": 3570, "test": 1530}


@pytest.mark.parametrize("source", ["hmdb51", "something-something-v2", "cc3m"])
def test_missing_clips_and_the_broken_one_are_quarantined(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short_lists: None
) -> None:
    small, _ = laid_out(make_config(source, tmp_path), tmp_path / "out", monkeypatch)
    probe_in_this_process(monkeypatch)
    manifest, quarantine = tmp_path / "manifest.parquet", tmp_path / "quarantine.parquet"
    build_manifest(small, None, manifest, quarantine, processes=1)
    rows = read_table(manifest, schema=MANIFEST_SCHEMA).to_pylist()
    refused = Counter(row["status"] for row in read_table(quarantine, schema=QUARANTINE_SCHEMA).to_pylist())
    assert Counter(row["split"] for row in rows)["train"] == 8
    broken = sum(count for status, count in refused.items() if status != "missing_file")
    assert broken == 1 and refused["missing_file"] > 100


def probe_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting processes that open files takes seconds."""
    monkeypatch.setattr(
        stm.datasets, "probe_files", lambda paths, settings, *_: ((p, probe_file(p, **settings)) for p in paths)
    )


def test_the_first_few_clips_of_an_own_copy_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy laid out here, as if it were the user's, complete for a benchmark of few clips."""
    counts = {1: {"train": 153, "test": 51}}
    monkeypatch.setitem(BENCHMARKS, "hmdb51", replace(BENCHMARKS["hmdb51"], counts=counts))
    own = make_config("hmdb51", tmp_path / "own")
    lay_out(own, make_config("hmdb51", tmp_path / "own", partial=True), tmp_path, [])
    small, made = laid_out(own, tmp_path / "out", monkeypatch)
    assert made.own_lists and made.generated == 0 and made.own_files == 9 + 4
    assert made.problem is not None and "dataset.partial: true" in made.problem
    assert read_benchmark(small.dataset).report.found == 9 + 4  # type: ignore[arg-type]


def test_the_first_rows_of_an_own_folder_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [f"{split}-{number}.mp4,{split},a,{number}.5" for split in ("train", "val") for number in range(20)]
    (tmp_path / "clips.csv").write_text("\n".join(["path,split,label,end", *lines]))
    (tmp_path / "videos").mkdir()
    for line in lines[1:]:
        (tmp_path / "videos" / line.split(",")[0]).touch()
    data = {"source": "folder", "root": str(tmp_path / "videos"), "annotations": str(tmp_path / "clips.csv")}
    small, made = laid_out(parse_config({"name": "own", "dataset": data}), tmp_path / "out", monkeypatch)
    assert made.own_files == 9 + 4
    dataset = small.dataset
    assert isinstance(dataset, FolderDataset) and dataset.annotations is not None
    rows = json.loads(Path(dataset.annotations).read_text())
    assert rows[0] == {"path": "train-1.mp4", "split": "train", "label": "a", "end": "1.5"}
    assert all((Path(dataset.root) / row["path"]).is_file() for row in rows)


@pytest.mark.parametrize("source", get_args(CorpusSource))
def test_every_corpus_has_a_list(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small, made = laid_out(make_config(source, tmp_path), tmp_path / "out", monkeypatch)
    assert made.generated == 9
    check_copy(small)
