"""Results shared between projects (`--cache`): equal results are reused, all others are computed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow

SHAPES = {"source": "moving-shapes", "clips": {"train": 3}, "frames": 8, "height": 64, "width": 64}


def write_project(folder: Path, name: str, models: Path, **captions: object) -> None:
    config = {
        "name": name,
        "results": f"{name}-results",
        "dataset": SHAPES,
        "grid": 4,
        "frames": {"every": 4, "short_side": 64},
        "captions": {name: {"kind": "blip2", "model": str(models / "demo-blip2"), "max_new_tokens": 4} | captions},
        "similarity": {"model": f"local-dir:{models / 'demo-clip'}"},
        "pack": {"captions": name},
    }
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


def snakemake(folder: Path, name: str, cache: Path | None, *arguments: str, fails: bool = False) -> str:
    command = [sys.executable, "-m", "snakemake", "-s", str(ROOT / "workflow/Snakefile"), "--directory", str(folder)]
    command += ["--cores", "1", *(["--cache"] if cache else []), *arguments]
    command += [
        "--configfile",
        str(folder / "config.yaml"),
        "--",
        f"{name}-results/{name}/similarity/{name}/train-00000.parquet",
    ]
    environment = {**os.environ, "SNAKEMAKE_OUTPUT_CACHE": str(cache or "")}
    finished = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    printed = finished.stdout + finished.stderr
    assert (finished.returncode != 0) == fails, printed[-6000:]
    return printed


def from_cache(printed: str) -> set[str]:
    """The kinds of results that a run took from the cache, or that a dry run would take."""
    taken = re.findall(r"^Symlinking output file \S+?-results/\w+/(\w+)/\S+ from cache", printed, re.M)
    stored = re.findall(r"^Moving output file \S+?-results/\w+/(\w+)/\S+ to cache", printed, re.M)
    planned = re.findall(r"^Output file \S+?-results/\w+/(\w+)/\S+ will be obtained from", printed, re.M)
    return set(planned) | (set(taken) - set(stored))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A project that has shared its results; the next project has the same models at another path."""
    path = tmp_path_factory.mktemp("sharing")
    (path / "cache").mkdir()
    (path / "models").symlink_to(ROOT / "stm/assets")
    write_project(path / "one", "one", ROOT / "stm/assets")
    printed = snakemake(path / "one", "one", path / "cache")
    assert from_cache(printed) == set()
    assert (path / "one/one-results/one/captions/one/train-00000.parquet").is_symlink()
    return path


def test_another_project_takes_frames_captions_and_similarity_of_the_same_clips(folder):
    write_project(folder / "two", "two", folder / "models")
    printed = snakemake(folder / "two", "two", folder / "cache")
    assert from_cache(printed) == {"frames", "captions", "similarity"}
    for one in sorted((folder / "one/one-results/one").glob("[fcs]*/**/train-*")):
        name = one.relative_to(folder / "one/one-results").as_posix().replace("one", "two")
        assert (folder / "two/two-results" / name).read_bytes() == one.read_bytes()
    # Nothing is left to do, with or without the cache.
    assert "Nothing to be done" in snakemake(folder / "two", "two", folder / "cache")
    assert "Nothing to be done" in snakemake(folder / "two", "two", None)


def test_another_setting_or_model_is_not_taken(folder, tmp_path):
    write_project(folder / "three", "three", folder / "models", max_new_tokens=5)
    made = snakemake(folder / "three", "three", folder / "cache", "--until", "split")
    printed = snakemake(folder / "three", "three", folder / "cache", "--dry-run")
    assert from_cache(printed) == {"frames"}, made
    other = tmp_path / "demo-blip2"
    other.mkdir()
    for file in (ROOT / "stm/assets/demo-blip2").iterdir():
        data = file.read_bytes()
        (other / file.name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]) if file.suffix == ".safetensors" else data)
    write_project(folder / "three", "three", other.parent)
    (tmp_path / "demo-clip").symlink_to(ROOT / "stm/assets/demo-clip")
    printed = snakemake(folder / "three", "three", folder / "cache", "--dry-run")
    assert from_cache(printed) == {"frames"}, "captions from other weights and their dependents are recomputed"


def test_a_cache_that_cannot_be_written_is_said_before_anything_runs(folder):
    printed = snakemake(folder / "one", "one", folder / "nowhere", "--forceall", fails=True)
    assert "SNAKEMAKE_OUTPUT_CACHE" in printed and "nowhere" in printed
    assert "Traceback" not in printed and "rule captions" not in printed
