"""A small config with every offline stage, and a way to run Snakemake on it in a separate folder."""

import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
CLIP = f"local-dir:{ROOT / 'stm/assets/demo-clip'}"
CLIPS = {"source": "moving-shapes", "frames": 8, "height": 64, "width": 64}
STAGES: dict[str, Any] = {
    "grid": 4,
    "frames": {"every": 2, "short_side": 64},
    "captions": {"human": {"kind": "human"}},
    "similarity": {"model": CLIP},
    "text": {"model": CLIP},
    "pack": {"captions": "human", "text": True, "flow": True},
}
RUN: dict[str, Any] = {
    "model": "tiny",
    "image_size": 32,
    "patch_size": 8,
    "frames": 4,
    "mask": {"strategy": "text_top", "ratio": 0.5},
    "contrast": {"hidden": 16},
    "optimisation": {"epochs": 1, "batch_size": 4, "warmup_epochs": 0},
    "augmentation": {"flip": False},
    "workers": 0,
}


def command(folder: Path, *arguments: str, cores: int = 1) -> list[str]:
    """The command that runs the workflow in `folder`, with its `config.yaml`."""
    snakemake = [sys.executable, "-m", "snakemake", "-s", str(ROOT / "workflow/Snakefile"), "--directory", str(folder)]
    return [*snakemake, "--cores", str(cores), *arguments, "--configfile", str(folder / "config.yaml")]


def snakemake(folder: Path, *arguments: str, cores: int = 1, fails: bool = False) -> str:
    """Run the workflow, assert that it succeeds (or `fails`), and return everything that it printed."""
    finished = subprocess.run(
        command(folder, *arguments, cores=cores), cwd=folder, capture_output=True, text=True, check=False
    )
    printed = finished.stdout + finished.stderr
    assert (finished.returncode != 0) == fails, printed[-6000:]
    return printed
