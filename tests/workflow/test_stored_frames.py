"""A small run in which frames are spread over the clips, taken from another dataset, and removed once packed."""

import csv
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_workflow import CLIP, snakemake
from synthetic_videos import make_pan, make_video

pytestmark = pytest.mark.slow

FOLDER = {"source": "folder", "root": "videos"}
TARGET = "results/questions/shards/train/train-00000.parquet"


def write_config(folder: Path, **values: Any) -> None:
    shared = {
        "name": "small",
        "grid": 4,
        "frames": {"count": 4, "short_side": 64, "keep": False},
        "captions": {"human": {"kind": "human"}},
        "pack": {"captions": "human", "motion": False},
        "datasets": {
            "retrieval": {
                "dataset": {**FOLDER, "annotations": "videos/retrieval.csv"},
                "pack": {"captions": None, "similarity": False},
            },
            "questions": {
                "dataset": {**FOLDER, "annotations": "videos/questions.csv"},
                "frames": {"from_dataset": "retrieval"},
            },
        },
    }
    (folder / "config.yaml").write_text(yaml.safe_dump({**shared, **values}))


def jobs_of(printed: str) -> dict[str, int]:
    """The number of jobs by rule, as Snakemake lists them."""
    rows = [line.split() for line in printed.split("Job stats:")[-1].split("total")[0].splitlines()]
    return {row[0]: int(row[1]) for row in rows if len(row) == 2 and row[1].isdigit()}


def test_frames_are_stored_once_removed_and_made_again_only_where_they_are_needed(tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    for number in range(3):
        make_video(videos / f"{number}.mp4", make_pan(12, 1, number, 96, 64))
    for name, listed in (("retrieval", "012"), ("questions", "01")):
        with (videos / f"{name}.csv").open("w") as file:
            csv.writer(file).writerows(
                [["path", "caption"], *([f"{video}.mp4", f"number {video}"] for video in listed)]
            )
    write_config(tmp_path, similarity={"model": CLIP})
    snakemake(tmp_path, TARGET, TARGET.replace("questions", "retrieval"), cores=2)
    results = tmp_path / "results"
    tars = {name: results / name / "frames/train-00000.tar" for name in ("retrieval", "questions")}
    sizes = {name: tar.stat().st_size for name, tar in tars.items()}
    assert sizes == {"questions": 0, "retrieval": 0}
    log = (results / "questions/logs/frames/train-00000.log").read_text()
    assert "2 of 2 clips have frames that are stored already" in log
    assert "Nothing to be done" in snakemake(tmp_path, TARGET, "--dry-run")

    # Maps of another size need the frames, and nothing else is made again.
    captions = (results / "questions/captions/human/train-00000.parquet").stat().st_mtime_ns
    frames = results / "questions/frames/train-00000.parquet"
    index, packed = frames.stat().st_mtime_ns, (tmp_path / TARGET).with_suffix(".tar").read_bytes()
    write_config(tmp_path, similarity={"model": CLIP, "window": 2})
    printed = snakemake(tmp_path, TARGET)
    assert jobs_of(printed) == {"similarity": 1, "shards": 1}
    log = (results / "questions/logs/similarity/human/train-00000.log").read_text()
    assert "removed after packing, and are made again" in log and "2 of 2 clips have frames" in log
    assert {name: tar.stat().st_size for name, tar in tars.items()} == sizes
    assert (results / "questions/captions/human/train-00000.parquet").stat().st_mtime_ns == captions
    assert frames.stat().st_mtime_ns == index
    assert (tmp_path / TARGET).with_suffix(".tar").read_bytes() != packed
    assert "Nothing to be done" in snakemake(tmp_path, TARGET, "--dry-run")

    # A shard that is packed again lends its own frames, although Snakemake deletes outputs before a job.
    write_config(tmp_path, similarity={"model": CLIP, "window": 2}, grid=8)
    assert jobs_of(snakemake(tmp_path, TARGET.replace("questions", "retrieval"))) == {"shards": 1}
    log = (results / "retrieval/logs/shards/train/train-00000.log").read_text()
    assert "3 of 3 clips have frames" in log
    assert tars["retrieval"].stat().st_size == 0
