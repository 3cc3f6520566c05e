"""The whole workflow, killed at random times and restarted, yields the same bytes as an uninterrupted run.

So does one of which single processes are killed, torchrun among them. `pytest tests/workflow/test_kills.py --kills 30` kills it
30 times.
"""

import hashlib
import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from small_workflow import CLIPS, RUN, STAGES, command

pytestmark = pytest.mark.slow

CONFIG = {
    **STAGES,
    "name": "killed",
    "dataset": {**CLIPS, "clips": {"train": 12}},
    "mask_quality": {"split": "train"},
    "pretrain": {
        "tgm": {
            **RUN,
            "optimisation": {**RUN["optimisation"], "epochs": 4},
            "checkpoint_every": 2,
            "processes": 2,
            "workers": 1,
        }
    },
    "evaluate": {
        "linear": {"task": "linear", "test_split": "train", "epochs": 2, "learning_rates": [0.01]},
    },
    "report": {"clips": 1, "split": "train"},
}
# Results that contain times: logs, benchmarks, metrics, and the pages and tables made from them.
TIMED: tuple[str, ...] = (
    "logs/",
    "benchmarks/",
    "pretrain/tgm/tensorboard/",
    "pretrain/tgm/metrics.jsonl",
    "report.html",
    "provenance.json",
    "plan.json",
)
TIMED += ("tables/stages.csv", "tables/plan.csv")


def start(folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """Start Snakemake in its own process group, so that all of its processes can be killed."""
    with (folder / "printed").open("ab") as printed:
        return subprocess.Popen(
            command(folder, *arguments), cwd=folder, stdout=printed, stderr=printed, start_new_session=True
        )


def finish(folder: Path, *arguments: str) -> None:
    code = start(folder, *arguments).wait()
    assert code == 0, (folder / "printed").read_text()[-6000:]


def alive(folder: Path) -> list[int]:
    """Ids of the processes whose working directory is in a folder."""
    found = []
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdigit() and (process / "cwd").readlink().is_relative_to(folder):
                found.append(int(process.name))
        except OSError:
            continue
    return found


def kill(workflow: subprocess.Popen[bytes], folder: Path) -> None:
    os.killpg(workflow.pid, signal.SIGKILL)
    workflow.wait()
    deadline = time.monotonic() + 60
    while left := alive(folder):
        assert time.monotonic() < deadline, f"processes {left} outlive the workflow"
        time.sleep(0.05)


def kill_one(workflow: subprocess.Popen[bytes], folder: Path, rng: np.random.Generator) -> str:
    """Kill torchrun, if it runs, in half of the cases, and else any process but Snakemake; return what was killed."""
    others = {}
    for pid in alive(folder):
        try:
            others[pid] = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
        except OSError:  # it has ended
            continue
    others.pop(workflow.pid, None)
    torchrun = [pid for pid, line in others.items() if "torch.distributed.run" in line]
    if not others:
        return ""
    pid = int(rng.choice(torchrun if torchrun and rng.random() < 0.5 else sorted(others)))
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return ""
    return others[pid]


def content(folder: Path) -> dict[str, str]:
    """SHA-256 of every result by path, hidden files included."""
    results = folder / "results/killed"
    files = {path.relative_to(results).as_posix(): path for path in sorted(results.rglob("*")) if path.is_file()}
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in files.items()
        if not name.startswith(TIMED)
    }


def begin(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    return folder


def test_a_killed_workflow_ends_in_the_same_bytes(
    tmp_path: Path, pytestconfig: pytest.Config, capsys: pytest.CaptureFixture[str]
) -> None:
    kills = pytestconfig.getoption("--kills")
    rng = np.random.default_rng(0)
    started = time.monotonic()
    finish(begin(tmp_path / "undisturbed"))
    seconds, expected = time.monotonic() - started, content(tmp_path / "undisturbed")
    assert {
        "frames/train-00000.tar",
        "shards/train/train-00000.tar",
        "pretrain/tgm/weights.safetensors",
    } <= expected.keys()
    done = 0
    runs = 0
    killed: list[str] = []  # single processes
    while done < kills:
        folder = begin(tmp_path / f"run{runs}")
        runs += 1
        code = None
        while done < kills and code != 0:
            workflow = start(folder)
            before = len(killed)
            code = None
            while code is None and done < kills:
                try:
                    # Short enough that each run is killed several times, from its first imports on.
                    code = workflow.wait(timeout=rng.uniform(0.02, 0.25) * seconds)
                except subprocess.TimeoutExpired:
                    if rng.random() < 0.5:
                        if one := kill_one(workflow, folder, rng):
                            killed.append(one)
                            done += 1
                        continue
                    done += 1
                    kill(workflow, folder)
                    finish(folder, "--unlock")
                    with capsys.disabled():
                        print(f"kill {done} of {kills}, in run {runs}: {len(content(folder))} results", len(killed))
                    break
            if code is None and workflow.poll() is None:
                code = workflow.wait()
            if code:
                assert len(killed) > before, (folder / "printed").read_text()[-6000:]
                assert not alive(folder), "processes outlive the workflow"
        finish(folder)
        found = content(folder)
        assert found == expected, {
            name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)
        }
    with capsys.disabled():
        print(
            f"{done} kills in {runs} runs, {len(killed)} of them of single processes",
            *(k[-200:] for k in killed),
            sep="\n",
        )
