"""What a pretraining job waits for, and which devices it asks for."""

import re
from pathlib import Path

import pytest
import yaml
from small_workflow import snakemake

pytestmark = pytest.mark.slow

RUN = {
    "model": "tiny",
    "image_size": 32,
    "patch_size": 8,
    "frames": 4,
    "mask": {"strategy": "tube", "ratio": 0.5},
    "optimisation": {"epochs": 1, "batch_size": 4, "warmup_epochs": 0},
}


@pytest.fixture(scope="module")
def dealt(tmp_path_factory) -> Path:
    """A folder where the clips are dealt to shards, so that Snakemake knows all jobs."""
    folder = tmp_path_factory.mktemp("dealt")
    (folder / "teacher").mkdir()
    (folder / "teacher/weights.bin").write_bytes(b"weights")
    (folder / "masks").mkdir()
    (folder / "masks/own.py").write_text("@register('own')\ndef own(guides, ratio): ...\n")
    attention = {**RUN, "mask": {"strategy": "attention", "ratio": 0.5}, "teacher": {"model": "local-dir:teacher"}}
    config = {
        "name": "made",
        "dataset": {"source": "moving-shapes", "clips": {"train": 8}, "frames": 8, "height": 64, "width": 64},
        "pack": {"similarity": False, "motion": False},
        "pretrain": {
            "first": RUN,
            "second": {**RUN, "init": "results/made/pretrain/first/weights.safetensors"},
            "taught": attention,
            "own": {**RUN, "mask": {"strategy": "masks/own.py:own", "ratio": 0.5}},
            "two": {**RUN, "processes": 2},
            "nodes": {**RUN, "processes": 2, "nodes": 2, "parallel": "fsdp"},
        },
        "evaluate": {"linear": {"task": "linear", "test_split": "train"}},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    snakemake(folder, "results/made/slices.json", cores=4)
    return folder


def jobs(folder: Path, *arguments: str) -> dict[str, str]:
    """What a dry run prints of each pretraining job, by run."""
    printed = snakemake(folder, "--dry-run", *arguments, cores=4)
    blocks = re.findall(r"^rule pretrain:\n((?: .*\n)+)", printed, re.M)
    return {re.search(r"run=(\w+)", block)[1]: block for block in blocks}


def test_a_run_waits_for_the_run_whose_weights_it_starts_from(dealt):
    found = jobs(dealt, "results/made/pretrain/second/weights.safetensors")
    assert set(found) == {"first", "second"}
    assert "pretrain/first/weights.safetensors" in found["second"]


def test_the_teachers_files_are_inputs(dealt):
    found = jobs(dealt, "results/made/pretrain/taught/weights.safetensors")
    assert "teacher/weights.bin" in found["taught"]


def test_the_file_of_a_mask_of_ones_own_is_an_input(dealt):
    found = jobs(dealt, "results/made/pretrain/own/weights.safetensors")
    assert "masks/own.py" in found["own"]


def test_a_run_asks_for_a_gpu_and_a_core_a_process(dealt):
    targets = [f"results/made/pretrain/{run}/weights.safetensors" for run in ("first", "two")]
    found = jobs(dealt, *targets)
    assert "gpu=1" in found["first"] and "gpu=2" in found["two"]
    assert "threads: 2" in found["two"]
    # With a single place on the GPUs a run of more processes takes it: it is not refused.
    assert "gpu=1" in jobs(dealt, *targets, "--resources", "gpu=1")["two"]


def test_a_run_on_two_nodes_asks_for_a_task_and_gpus_on_each(dealt):
    found = jobs(dealt, *[f"results/made/pretrain/{run}/weights.safetensors" for run in ("two", "nodes")])
    asked = ("gres=gpu:2", "mpi=srun", "nodes=2", "tasks=2", "tasks_per_gpu=0")
    assert all(word in found["nodes"] for word in asked) and "threads: 2" in found["nodes"]
    assert "nodes=" not in found["two"] and "mpi=" not in found["two"]
