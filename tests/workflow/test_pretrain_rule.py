"""The inputs that a pretraining job waits for, and the devices that it requests."""

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


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this machine has."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder in which the split stage has run, so that Snakemake knows all jobs."""
    folder = tmp_path_factory.mktemp("split")
    (folder / "teacher").mkdir()
    (folder / "teacher/weights.bin").write_bytes(b"weights")
    (folder / "masks").mkdir()
    (folder / "masks/own.py").write_text("@register('own')\ndef own(guides, ratio): ...\n")
    attention = {**RUN, "mask": {"strategy": "attention", "ratio": 0.5}, "teacher": {"model": "local-dir:teacher"}}
    config = {
        "name": "small",
        "dataset": {"source": "moving-shapes", "clips": {"train": 8}, "frames": 8, "height": 64, "width": 64},
        "pack": {"similarity": False, "motion": False},
        "pretrain": {
            "first": RUN,
            "second": {**RUN, "init": "results/small/pretrain/first/weights.safetensors"},
            "attention": attention,
            "own": {**RUN, "mask": {"strategy": "masks/own.py:own", "ratio": 0.5}},
            "two": {**RUN, "processes": 2},
            "nodes": {**RUN, "processes": 2, "nodes": 2, "parallel": "fsdp"},
        },
        "evaluate": {"linear": {"task": "linear", "test_split": "train"}},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    snakemake(folder, "results/small/slices.json", cores=4)
    return folder


PROFILE = Path(__file__).parents[2] / "workflow/profiles/slurm"


def jobs(folder: Path, *arguments: str) -> dict[str, str]:
    """The text that a dry run prints per pretraining job, by run."""
    printed = snakemake(folder, "--dry-run", *arguments, cores=4)
    blocks = re.findall(r"^rule pretrain:\n((?: .*\n)+)", printed, re.M)
    return {re.search(r"run=(\w+)", block)[1]: block for block in blocks}


def test_a_run_waits_for_the_run_whose_weights_it_starts_from(folder):
    blocks = jobs(folder, "results/small/pretrain/second/weights.safetensors")
    assert set(blocks) == {"first", "second"}
    assert "pretrain/first/weights.safetensors" in blocks["second"]


def test_the_teachers_files_are_inputs(folder):
    blocks = jobs(folder, "results/small/pretrain/attention/weights.safetensors")
    assert "teacher/weights.bin" in blocks["attention"]


def test_the_file_of_a_mask_of_ones_own_is_an_input(folder):
    blocks = jobs(folder, "results/small/pretrain/own/weights.safetensors")
    assert "masks/own.py" in blocks["own"]


def test_a_run_asks_for_a_gpu_and_a_core_a_process(folder):
    targets = [f"results/small/pretrain/{run}/weights.safetensors" for run in ("first", "two")]
    blocks = jobs(folder, *targets)
    assert "gpu=1" in blocks["first"] and "gpu=2" in blocks["two"]
    assert "threads: 2" in blocks["two"]
    # Where `--resources` offers a single GPU, a run with two processes requests that one instead of being rejected.
    assert "gpu=1" in jobs(folder, *targets, "--resources", "gpu=1")["two"]


def test_a_run_on_two_nodes_asks_for_a_task_and_gpus_on_each(folder):
    blocks = jobs(folder, *[f"results/small/pretrain/{run}/weights.safetensors" for run in ("two", "nodes")])
    requested = ("gres=gpu:2", "mpi=srun", "nodes=2", "tasks=2", "tasks_per_gpu=0")
    assert all(word in blocks["nodes"] for word in requested) and "threads: 2" in blocks["nodes"]
    # One node, because Slurm would collect two GPUs from two nodes of one each.
    assert "nodes=1" in blocks["two"] and "mpi=" not in blocks["two"]


def test_a_machine_offers_the_gpus_that_it_has(folder, tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H200 (UUID: GPU-a1)'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    targets = [f"results/small/pretrain/{run}/weights.safetensors" for run in ("first", "two")]
    printed = snakemake(folder, "--dry-run", *targets, cores=4, fails=True)
    assert "pretrain small/two uses 2 GPUs, one per process, and the workflow may use 1 of this machine's" in printed
    # Hidden, they change nothing.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "gpu=2" in jobs(folder, *targets)["two"]


def test_the_profile_replaces_no_number_of_runs_and_evaluations():
    """It would replace that of all of them, such as `nodes: 1` that of an evaluation on two nodes."""
    replaced = yaml.safe_load((PROFILE / "config.yaml").read_text())["set-resources"]
    assert set(replaced["pretrain"]) == set(replaced["evaluate"]) == {"slurm_partition"}


def test_a_cluster_is_asked_for_what_the_run_needs(folder):
    targets = [f"results/small/pretrain/{run}/weights.safetensors" for run in ("two", "nodes")]
    found = jobs(folder, *targets, "--workflow-profile", str(PROFILE))
    # Two processes with two loading processes each request six cores, of which `--cores` allows four.
    for block in found.values():
        assert "threads: 4" in block and "runtime=40" in block and "slurm_partition=gpu" in block
        assert "mem_mb=37000" in block  # 16,000 + 2 x (8,000 + 2 x 1,000) and the batches
