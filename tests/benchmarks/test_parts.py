"""Each benchmark runs at a small size and counts correctly. Speed itself is never tested."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import training_sweep as sweep
from benchmarks._table import ROWS
from stm.config import LanguageRun
from stm.methods import build_method

ROOT = Path(__file__).parents[2]


def run(name: str, *arguments: str, folder: Path) -> dict[str, dict]:
    """Run a part; return its rows by name."""
    command = [sys.executable, "-m", f"benchmarks.{name}", *arguments, "--rounds", "1"]
    environment = {**os.environ, ROWS: str(folder / "rows.json"), "CUDA_VISIBLE_DEVICES": ""}
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr[-4000:]
    rows = {row["what"]: row for row in json.loads((folder / "rows.json").read_text())}
    assert all(row["ratio"] > 0 for row in rows.values())
    return rows


@pytest.mark.slow
def test_the_loader_is_compared_with_decord_and_with_other_loaders(tmp_path: Path) -> None:
    toy = ("--clips", "1", "--seconds", "3", "--visits", "1", "--workers", "1", "--gop", "12")
    rows = run("loader", *toy, folder=tmp_path)
    assert "decord" in rows["loader, key frame every 12"]["against"]
    peers = [what for what in rows if what.startswith("loader, beside ")]
    assert "loader, beside webdataset" in peers  # litdata and streaming if they are installed
    cores = rows["loader, cores to supply a step"]
    assert cores["speed"] == f"{1 / cores['ratio']:.1f} cores"
    decoded, jpegs = (rows[f"loader{place}, cores for an H200"] for place in ("", ", decoding left to the device"))
    assert jpegs["ratio"] > 3 * decoded["ratio"]


@pytest.mark.slow
def test_motion_is_compared_with_plain_decoding(tmp_path: Path) -> None:
    rows = run("motion", "--clips", "1", "--frames", "24", folder=tmp_path)
    names = ("340x256 x264.mkv", "340x256 x264 no B.mkv")
    assert {f"motion, {backend}, {name}" for backend in ("codec", "transcode", "mestimate") for name in names} == set(
        rows
    )


@pytest.mark.slow
def test_similarity_is_compared_with_the_tower_alone(tmp_path: Path) -> None:
    rows = run("similarity", "--small", "--grid", "3", "--batch-size", "8", folder=tmp_path)
    assert len(rows) == 2


@pytest.mark.slow
def test_a_step_is_compared_with_transformers_in_time_memory_and_graphs(tmp_path: Path) -> None:
    rows = run("training_step", "--size", "tiny", "--image-size", "32", "--frames", "4", folder=tmp_path)
    assert rows["graphs of a step"]["speed"].startswith("1 ") and rows["graphs of a step"]["ratio"] < 1
    assert {"peak memory", "peak memory, 0.5 decoded"} < set(rows)


@pytest.mark.slow
def test_captions_are_compared_with_one_clip_at_a_time(tmp_path: Path) -> None:
    assert len(run("captions", "--clips", "2", folder=tmp_path)) == 1


@pytest.mark.slow
def test_the_sweep_runs_mae_and_umt_with_and_without_compilation_and_from_the_loader(tmp_path: Path) -> None:
    rows = run("training_sweep", "--toy", "--device", "cpu", "--ratios", "0.75", folder=tmp_path)
    variants = ("", ", compiled")
    assert set(rows) >= {f"{name}, batch 2{variant}" for name in ("MAE 0.75", "UMT 0.8") for variant in variants}
    assert sum("from the loader" in what for what in rows) == 1


def test_the_cost_of_umts_student_is_what_torch_counts(tmp_path: Path) -> None:
    jobs = list(sweep.make_jobs(tmp_path, sweep_arguments()))
    job = next(job for job in jobs if job.name.startswith("UMT"))
    assert isinstance(job.run, LanguageRun)
    method = build_method(job.run)
    for module in method.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # type: ignore[assignment]  # torch does not count the fused attention of CPUs
    batch = sweep.draw_batch(job._replace(batch=1), torch.device("cpu"))
    counted = []
    for work in (lambda: method(batch)["loss"].backward(), lambda: method.teacher(batch["video"])):  # type: ignore[misc]
        with FlopCounterMode(display=False) as counter:
            work()
        counted.append(counter.get_total_flops())
    assert counted[0] - counted[1] == sweep.umt_student_flop(job.run, sweep.TOY_TEACHER)


def sweep_arguments():
    import argparse

    return argparse.Namespace(ratios=[0.9], batches=[1], toy=True)
