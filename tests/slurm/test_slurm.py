"""The workflow on a real Slurm, by the shipped profile: all stages, one stage again, jobs that are killed or preempted.

What a run on a cluster leaves is compared byte by byte with what one process of this machine makes of the same config.
`make test-slurm` runs these and shows Slurm's own accounting.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from cluster import Cluster, missing_programs

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(missing_programs()),
        reason=f"no {', '.join(missing_programs())}; on Debian: apt-get install munge slurm-wlm",
    ),
]

# Generous: the machine may be busy with other work.
RUN_SECONDS = 3600
CLIP = f"local-dir:{ROOT / 'stm/assets/demo-clip'}"
# The demo's stages, as small as they go; pretraining takes many small steps, so that it can be stopped in the middle.
CONFIG = {
    "name": "micro",
    "dataset": {
        "source": "moving-shapes",
        "clips": {"train": 4, "test": 3},
        "frames": 8,
        "height": 64,
        "width": 64,
        "distractors": 1,
    },
    "shard_size": 4,
    "grid": 4,
    "frames": {"every": 2, "short_side": 64},
    "captions": {
        "blip2": {"kind": "blip2", "model": str(ROOT / "stm/assets/demo-blip2"), "key_frames": 1, "max_new_tokens": 4}
    },
    "similarity": {"model": CLIP, "keep_embeddings": True},
    "text": {"model": CLIP},
    "pack": {"captions": "blip2", "similarity": True, "motion": True, "flow": True, "text": True},
    "pretrain": {
        "text": {
            "model": "tiny",
            "image_size": 32,
            "frames": 4,
            "mask": {"strategy": "text_top", "ratio": 0.5},
            "optimisation": {"epochs": 400, "batch_size": 2, "warmup_epochs": 0},
            "augmentation": {"flip": False},
            "workers": 0,
            "checkpoint_every": 50,
        }
    },
    "evaluate": {
        "linear": {"task": "linear", "epochs": 1, "learning_rates": [0.1]},
        "retrieval": {"task": "retrieval"},
    },
    "mask_quality": {"split": "test", "crops": 2, "image_size": 32},
    "report": {"clips": 1, "split": "train"},
}
# What a user changes for a small machine: few cores a job, few jobs at a time, and a look at the queue now and then.
SMALL = [
    "--jobs",
    "2",
    "--slurm-init-seconds-before-status-checks",
    "5",
    "--slurm-keep-successful-logs",
    "--set-threads",
]
SMALL += [f"{rule}=1" for rule in ("generate", "manifest", "frames", "motion", "flow", "captions", "embeddings")]
SMALL += [f"{rule}=1" for rule in ("similarity", "pretrain", "evaluate")]
WEIGHTS = "results/micro/pretrain/text/weights.safetensors"
GPU_RULES = {"captions", "embeddings", "similarity", "text", "pretrain", "evaluate"}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


def start(folder: Path, *arguments: str, cluster: Cluster | None = None) -> subprocess.Popen[str]:
    """Starts the workflow in `folder`, on the cluster or as one process of this machine."""
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    command = [sys.executable, "-m", "snakemake", "-s", str(ROOT / "Snakefile"), "--directory", str(folder), *arguments]
    if cluster is None:
        command += ["--cores", "1"]
    else:
        command += ["--workflow-profile", str(ROOT / "workflow/profiles/slurm"), *SMALL]
    return subprocess.Popen(
        [*command, "--configfile", str(folder / "config.yaml")],
        cwd=folder,
        env=cluster.environment if cluster else os.environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    """Waits for the end of a run, which must be a good one, and returns all that it printed."""
    try:
        printed, _ = process.communicate(timeout=RUN_SECONDS)
    finally:
        process.kill()
    assert process.returncode == 0, printed[-8000:]
    return printed


def content(folder: Path) -> dict[str, str]:
    """Hashes of the data of all stages and of the weights."""
    root = folder / "results/micro"
    kinds = [*root.rglob("*.tar"), *root.rglob("*.parquet"), *root.rglob("*.safetensors")]
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(kinds)}


def submitted(cluster: Cluster, known: list[dict[str, str]]) -> list[dict[str, str]]:
    """The jobs of the accounting that are not `known`."""
    before = {job["id"] for job in known}
    return [job for job in cluster.jobs() if job["id"] not in before]


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("local")
    finish(start(folder))
    return folder


@pytest.fixture(scope="module")
def finished(cluster, tmp_path_factory) -> tuple[Path, list[dict[str, str]]]:
    """A folder in which the cluster has made everything, and the accounting of its jobs."""
    folder = tmp_path_factory.mktemp("finished")
    finish(start(folder, cluster=cluster))
    return folder, cluster.jobs()


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished[0], tmp_path / "run"))


def test_all_stages_run_as_jobs_of_slurm(finished):
    folder, accounting = finished
    print(table(accounting))
    assert (folder / "results/micro/report.html").stat().st_size > 10_000
    once = ["generate", "manifest", "split", "plan", "pretrain", "mask_quality", "faithfulness", "report"]
    # Frames, motion and flow of a shard are one job.
    twice = ["decode", "captions", "embeddings", "similarity", "text", "shards", "evaluate"]
    assert Counter(job["rule"] for job in accounting) == Counter(once + 2 * twice)
    assert {job["state"] for job in accounting} == {"COMPLETED"}
    assert len({job["node"] for job in accounting}) > 1
    for job in accounting:
        on_gpu = job["rule"] in GPU_RULES
        assert (job["partition"], job["gpus"]) == (("gpu", "gres:gpu:1") if on_gpu else ("cpu", "N/A")), job


def test_a_cluster_makes_the_same_bytes_as_one_process(finished, local):
    assert content(finished[0]) == content(local)


def test_only_the_stage_that_is_asked_for_is_submitted(copy, cluster):
    before, known = content(copy), cluster.jobs()
    (copy / "results/micro/text/blip2/test-00000.parquet").unlink()
    finish(start(copy, "results/micro/shards/test/test-00000.parquet", cluster=cluster))
    assert Counter(job["rule"] for job in submitted(cluster, known)) == Counter(["text", "shards"])
    assert content(copy) == before


def kill(cluster: Cluster, job: str) -> None:
    """Nothing is saved: the processes are gone."""
    cluster.run("scancel", "--signal=KILL", job)


def warn(cluster: Cluster, job: str) -> None:
    """What Slurm does before the time is up: a signal to the job's processes, not to its script."""
    cluster.run("scancel", "--signal=TERM", job)


def preempt(cluster: Cluster, job: str) -> None:
    """A job of more urgent people takes the node, all of it."""
    node = next(found["node"] for found in cluster.jobs() if found["id"] == job)
    urgent = ["--partition=urgent", "--exclusive", f"--nodelist={node}", "--time=5", "--output=/dev/null"]
    cluster.run("sbatch", *urgent, "--comment=rule_urgent", "--wrap=sleep 5")


@pytest.mark.parametrize("interrupt", [kill, warn, preempt])
def test_an_interrupted_pretraining_goes_on_from_its_checkpoint(copy, cluster, interrupt):
    expected, known = content(copy), cluster.jobs()
    shutil.rmtree(copy / "results/micro/pretrain")
    process = start(copy, WEIGHTS, cluster=cluster)
    checkpoints = copy / "results/micro/pretrain/text/checkpoints"
    wait_for(process, lambda: any(checkpoints.glob("step-*.pt.sha256")))
    [first] = submitted(cluster, known)
    interrupt(cluster, first["id"])
    finish(process)
    attempts = [job for job in submitted(cluster, known) if job["rule"] == "pretrain"]
    print(table(submitted(cluster, known)))
    if interrupt is preempt:
        # Slurm itself puts the job back in its queue; to Snakemake it is still the same job.
        assert [(job["state"], job["restarts"]) for job in attempts] == [("COMPLETED", "1")]
    else:
        assert [job["state"] for job in attempts] == ["FAILED", "COMPLETED"]
    output = "\n".join(path.read_text() for path in (copy / ".snakemake/slurm_logs").rglob("*.log"))
    assert "goes on after step" in output
    assert ("SIGTERM: saved after step" in output) == (interrupt is not kill)
    assert content(copy) == expected


def wait_for(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + RUN_SECONDS
    while not condition():
        assert process.poll() is None, finish(process)
        assert time.monotonic() < deadline
        time.sleep(0.1)


def table(jobs: list[dict[str, str]]) -> str:
    """The accounting as text."""
    keys = [
        "id",
        "rule",
        "wildcards",
        "partition",
        "node",
        "cpus",
        "memory",
        "gpus",
        "limit",
        "elapsed",
        "restarts",
        "state",
    ]
    rows = [keys, *([job[key] for key in keys] for job in jobs)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(keys))]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
