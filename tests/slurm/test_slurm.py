"""The workflow on a real Slurm, by the shipped profile: all stages, one stage again, jobs that are killed or preempted.

What a run on a cluster leaves is compared byte by byte with what one process of this machine makes of the same config.
`make test-slurm` runs these, shows Slurm's own accounting and keeps it in results/slurm-accounting.txt.
"""

import hashlib
import os
import re
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
PROFILE = ROOT / "workflow/profiles/slurm/config.yaml"
ACCOUNTING = ROOT / "results/slurm-accounting.txt"
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
            "optimisation": {"epochs": 300, "batch_size": 2, "warmup_epochs": 0},
            "contrast": {"hidden": 32},
            "augmentation": {"flip": False},
            "workers": 0,
            "checkpoint_every": 40,
        }
    },
    "evaluate": {
        "linear": {"task": "linear", "epochs": 1, "learning_rates": [0.1]},
        "retrieval": {"task": "retrieval"},
    },
    "mask_quality": {"split": "test", "crops": 2, "image_size": 32},
    "tables": {
        "strategies": {
            "title": "Masks",
            "columns": [{"title": "Linear", "task": "linear"}],
            "rows": [{"label": "Text", "runs": "text"}],
        }
    },
    "figures": {"curves": {"title": "Losses", "kind": "losses", "runs": {"Text": "text"}}},
    "report": {"clips": 1, "split": "train"},
}
# What a user changes for a small machine: few cores a job, few jobs at a time, and frequent looks at the queue.
SMALL = ["--jobs", "4", "--slurm-init-seconds-before-status-checks", "5", "--slurm-keep-successful-logs"]
SMALL += ["--set-threads"]
SMALL += [f"{rule}=1" for rule in ("generate", "manifest", "frames", "motion", "flow", "captions", "embeddings")]
SMALL += [f"{rule}=1" for rule in ("similarity", "pretrain", "evaluate")]
WEIGHTS = "results/micro/pretrain/text/weights.safetensors"
ACCOUNT = "vision-lab"
GPU_RULES = {"captions", "embeddings", "similarity", "text", "pretrain", "evaluate", "crop_agreement"}


# The jobs that it takes: frames, motion and flow of a shard are one, and so are the tables, the figures and the page.
ONCE = [
    "generate",
    "manifest",
    "split",
    "plan",
    "pretrain",
    "mask_quality",
    "crop_agreement",
    "report_figure_report_table",
]
TWICE = ["decode_flow_frames_motion", "captions", "embeddings", "similarity", "text", "shards", "evaluate"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster
        jobs = cluster.jobs()
        ACCOUNTING.parent.mkdir(exist_ok=True)
        ACCOUNTING.write_text(
            f"Jobs, by squeue; `peak` is the most memory that sstat saw a step with:\n\n{table(jobs)}\n\n"
            f"{len(jobs)} jobs: {dict(Counter(job['state'] for job in jobs))}; "
            f"{sum(int(job['restarts']) for job in jobs)} put back into the queue\n\n"
            f"Ended jobs, by jobcomp/filetxt:\n\n{cluster.record()}"
        )


class Run:
    """The workflow in `folder`, started on the cluster or as one process of this machine. `with` leaves none behind."""

    def __init__(self, folder: Path, *arguments: str, cluster: Cluster | None = None, **pretraining: int) -> None:
        run = CONFIG["pretrain"]["text"] | pretraining
        (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG | {"pretrain": {"text": run}}))
        command = [
            sys.executable,
            "-m",
            "snakemake",
            "-s",
            str(ROOT / "workflow/Snakefile"),
            "--directory",
            str(folder),
        ]
        if cluster is None:
            command += ["--cores", "1"]
        else:
            command += ["--workflow-profile", str(filled_in(folder)), *SMALL]
        # A file, because nobody reads a pipe while several runs go on.
        self._printed = folder / "printed.txt"
        with self._printed.open("wb") as printed:
            self.process = subprocess.Popen(
                [*command, "--configfile", str(folder / "config.yaml"), "--", *arguments],
                cwd=folder,
                env=cluster.environment if cluster else os.environ,
                stdout=printed,
                stderr=subprocess.STDOUT,
            )

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:  # it waits for its jobs
            self.process.kill()
            self.process.wait()

    def finish(self) -> None:
        """Waits for the end of the run, which must be a good one."""
        with self:
            self.process.wait(RUN_SECONDS)
        assert self.process.returncode == 0, self.printed()[-8000:]

    def printed(self) -> str:
        """What the run has printed so far."""
        return self._printed.read_text()

    def wait_for(self, condition: Callable[[], object]) -> None:
        """Waits until something holds, which must be before the end of the run."""
        deadline = time.monotonic() + RUN_SECONDS
        while not condition():
            assert self.process.poll() is None, self.printed()[-8000:]
            assert time.monotonic() < deadline
            time.sleep(0.1)


def filled_in(folder: Path) -> Path:
    """A copy of the profile with an account, as a user fills it in."""
    text, count = re.subn(r"(?m)^  # (slurm_account:) .*$", rf'  \1 "{ACCOUNT}"', PROFILE.read_text())
    assert count == 1
    path = folder / "profile/config.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path.parent


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
def local(tmp_path_factory) -> Iterator[tuple[Path, Run]]:
    """The same by one process, while the cluster's jobs wait for each other."""
    folder = tmp_path_factory.mktemp("local")
    with Run(folder) as run:
        yield folder, run


@pytest.fixture(scope="module")
def finished(cluster, local, tmp_path_factory) -> tuple[Path, list[dict[str, str]]]:
    """A folder in which the cluster has made everything, and the accounting of its jobs."""
    folder = tmp_path_factory.mktemp("finished")
    Run(folder, cluster=cluster).finish()
    return folder, cluster.jobs()


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished[0], tmp_path / "run"))


def test_all_stages_run_as_jobs_of_slurm(finished):
    folder, accounting = finished
    print(table(accounting))
    assert (folder / "results/micro/report.html").stat().st_size > 10_000
    assert Counter(job["rule"] for job in accounting) == Counter(ONCE + 2 * TWICE)
    assert {(job["state"], job["exit"], job["restarts"]) for job in accounting} == {("COMPLETED", "0:0", "0")}
    assert len({job["node"] for job in accounting}) > 1


def test_no_rule_is_left_out():
    # All rules but the one that makes the demo's models, which are in the repository, the one that runs all others, and the one
    # that does the work of `similarity` for several caption sources.
    files = [p for p in (ROOT / "workflow/rules").glob("*.smk") if p.stem not in ("demo_models", "rehearse")]
    rules = {name for path in files for name in re.findall(r"(?m)^(?:rule|checkpoint) (\w+):", path.read_text())}
    profile = yaml.safe_load(PROFILE.read_text())
    alone = {*ONCE, *TWICE} - {"decode_flow_frames_motion", "report_figure_report_table"}
    assert alone | set(profile["groups"]) == rules - {"joint_similarity"}
    assert profile["set-resources"]["joint_similarity"] == profile["set-resources"]["similarity"]


def test_jobs_ask_for_what_profile_and_rules_say(finished):
    for job in finished[1]:
        on_gpu = job["rule"] in GPU_RULES
        assert (job["partition"], job["gpus"]) == (("gpu", "gres:gpu:1") if on_gpu else ("cpu", "N/A")), job
        assert job["account"] == ACCOUNT, job
    asked = {job["rule"]: (job["memory"], job["limit"]) for job in finished[1]}
    assert asked["split"] == ("4000M", "2:00:00")  # the profile's
    # Half an hour, and twice the planned seconds. The run: one process, which loads its tiny batches itself.
    assert asked["captions"] == ("16000M", "40:00")
    assert asked["pretrain"] == ("26000M", "40:00")


def test_what_no_node_can_give_is_refused_before_anything_waits_for_it(copy, cluster):
    shutil.rmtree(copy / "results/micro/pretrain")
    known = cluster.jobs()
    with Run(copy, WEIGHTS, cluster=cluster, processes=2) as run:  # nodes have one GPU
        run.process.wait(RUN_SECONDS)
    printed = run.printed()
    assert run.process.returncode != 0
    assert "pretrain" in printed and "Requested node configuration is not available" in printed
    # Slurm remembers the refused submissions, which had neither a node nor a second.
    refused = {(job["node"], job["elapsed"], job["state"]) for job in submitted(cluster, known)}
    assert refused == {("", "0:00", "FAILED")}


def test_a_cluster_makes_the_same_bytes_as_one_process(finished, local):
    folder, run = local
    run.finish()
    assert content(finished[0]) == content(folder)


def test_only_the_stage_that_is_asked_for_is_submitted(copy, cluster):
    before, known = content(copy), cluster.jobs()
    text, shards = "results/micro/text/blip2/test-00000.parquet", "results/micro/shards/test/test-00000.parquet"
    (copy / text).unlink()
    Run(copy, text, shards, cluster=cluster).finish()
    # The text vectors, and what is made of them.
    assert Counter(job["rule"] for job in submitted(cluster, known)) == Counter(["text", "shards"])
    assert content(copy) == before


def kill(cluster: Cluster, job: str) -> None:
    """Nothing is saved: the processes of the job's step are gone, as they are when a node's memory is used up."""
    cluster.run("scancel", "--signal=KILL", f"{job}.0")


def warn(cluster: Cluster, job: str) -> None:
    """What Slurm does before the time is up: a signal to the job's processes, not to its script."""
    cluster.run("scancel", "--signal=TERM", job)


def preempt(cluster: Cluster, job: str) -> None:
    """A job of more urgent people takes the node, all of it."""
    node = next(found["node"] for found in cluster.jobs() if found["id"] == job)
    urgent = ["--partition=urgent", "--exclusive", f"--nodelist={node}", "--time=5", "--output=/dev/null"]
    cluster.run("sbatch", *urgent, "--comment=rule_urgent", "--wrap=sleep 5")


def interrupt_pretraining(copy: Path, cluster: Cluster, **pretraining: int) -> list[str]:
    """Has a pretraining killed, warned and preempted by the cluster; returns what its three jobs have said."""
    known = cluster.jobs()

    def attempts() -> list[dict[str, str]]:
        return [job for job in submitted(cluster, known) if job["rule"] == "pretrain"]

    def checkpoints() -> set[Path]:
        return set((copy / "results/micro/pretrain/text/checkpoints").glob("step-*.pt.sha256"))

    with Run(copy, WEIGHTS, cluster=cluster, **pretraining) as run:
        for number, interrupt in enumerate([kill, warn, preempt], 1):
            run.wait_for(lambda number=number: len(attempts()) == number)  # type: ignore[misc]
            before = checkpoints()
            run.wait_for(lambda before=before: checkpoints() - before)  # type: ignore[misc]
            interrupt(cluster, attempts()[-1]["id"])
        run.finish()
    print(table(submitted(cluster, known)))
    # Slurm itself puts a preempted job back into its queue; to Snakemake it is still the same job, the last of three.
    assert [(job["state"], job["restarts"]) for job in attempts()] == [
        ("FAILED", "0"),
        ("FAILED", "0"),
        ("COMPLETED", "1"),
    ]
    # Memory and time grow with each attempt.
    assert [job["memory"] for job in attempts()] == ["26000M", "52000M", "78000M"]
    assert [job["limit"] for job in attempts()] == ["40:00", "1:20:00", "2:00:00"]
    return [next((copy / ".snakemake/slurm_logs").rglob(f"{job['id']}.log")).read_text() for job in attempts()]


def test_a_pretraining_that_is_killed_warned_and_preempted_ends_with_the_same_weights(copy, cluster):
    expected = content(copy)
    shutil.rmtree(copy / "results/micro/pretrain")
    first, second, third = interrupt_pretraining(copy, cluster)
    saved, goes_on = "SIGTERM: saved after step", "resuming from step"
    assert (first.count(saved), first.count(goes_on)) == (0, 0)
    assert (second.count(saved), second.count(goes_on)) == (1, 1)
    assert (third.count(saved), third.count(goes_on)) == (1, 2)
    assert content(copy) == expected


def test_so_does_one_on_two_nodes(copy, cluster, tmp_path):
    shutil.rmtree(copy / "results/micro/pretrain")
    one_node = shutil.copytree(copy, tmp_path / "one node")
    Run(one_node, WEIGHTS, processes=2).finish()
    known = cluster.jobs()
    first, second, third = interrupt_pretraining(copy, cluster, nodes=2)
    nodes = [job["node"] for job in submitted(cluster, known) if job["rule"] == "pretrain"]
    assert [len(re.findall(r"\d", names)) for names in nodes] == [2, 2, 2]  # such as node[1-2]
    # Each of the two processes says that it has saved, the first one where it goes on.
    saved, goes_on = "saved after step", "resuming from step"
    assert (first.count(saved), first.count(goes_on)) == (0, 0)
    assert (second.count(saved), second.count(goes_on)) == (2, 1)
    assert (third.count(saved), third.count(goes_on)) == (2, 2)
    assert content(copy) == content(one_node)


def table(jobs: list[dict[str, str]]) -> str:
    """The accounting as text."""
    keys = [
        "id",
        "rule",
        "wildcards",
        "account",
        "partition",
        "node",
        "cpus",
        "memory",
        "peak",
        "gpus",
        "limit",
        "elapsed",
    ]
    keys += ["restarts", "state", "exit", "name"]
    rows = [keys, *([job[key] for key in keys] for job in jobs)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(keys))]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
