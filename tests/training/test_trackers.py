"""W&B and MLflow, for real and offline: what they hold of a run that was killed and resumed, and of runs without them."""

import io
import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from stm.config import ConfigError
from stm.distributed.process import Process
from stm.training import trackers
from stm.training.logs import MetricsLog
from stm.training.trackers import External, check_trackers, log_result

ALL = ("tensorboard", "wandb", "mlflow")
SETTINGS = {"run": {"mask": {"ratio": 0.6}, "model": "tiny"}, "seed": 3}
FIRST = Process(0, 1, torch.device("cpu"))
SECRET = "0123456789abcdef" * 2 + "01234567"  # as long as a key of W&B


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No server, no account, and places inside the test's folder."""
    for name in [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path / 'mlruns'}")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.chdir(tmp_path)


def read_wandb(path: Path) -> Iterator[Any]:
    """The records of a file of W&B: LevelDB's log format, in blocks of 32 KiB after a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    messages: Any = wandb_internal_pb2  # its classes are made at import
    data, position, part = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if (left := 32768 - position % 32768) < 7:
            position += left
            continue
        length, kind = struct.unpack("<HB", data[position + 4 : position + 7])
        part += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last of several parts
            yield messages.Record.FromString(part)
            part = b""


def wandb_losses(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and losses of the offline runs in a folder, by run."""
    found: dict[str, list[tuple[int, float]]] = {}
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        run = found.setdefault(path.stem.removeprefix("run-"), [])
        for record in read_wandb(path):
            values = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
            run += [(int(values["_step"]), float(values["loss"]))] if "loss" in values else []
    return found


def mlflow_losses(run: str, key: str = "loss") -> list[tuple[int, float]]:
    from mlflow.tracking import MlflowClient

    return [(metric.step, metric.value) for metric in MlflowClient().get_metric_history(run, key)]


def log_steps(folder: Path, names: Sequence[str], after: int, steps: Sequence[int]) -> None:
    with MetricsLog(folder, after, FIRST, names, "pretrain tube", SETTINGS) as log:
        for step in steps:
            log.write(step, {"epoch": step / 10, "loss": 1 / step})


def ids(folder: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads((folder / "trackers.json").read_text())
    return found


def losses(*steps: int) -> list[tuple[int, float]]:
    return [(step, pytest.approx(1 / step, rel=1e-6)) for step in steps]  # type: ignore[misc]


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from stm.distributed.process import Process
from stm.training.logs import MetricsLog
log = MetricsLog(Path(sys.argv[1]), 0, Process(0, 1, torch.device("cpu")), sys.argv[2:], "pretrain tube", {"seed": 3})
for step in (1, 2, 3, 4):
    log.write(step, {"epoch": step / 10, "loss": 1 / step})
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_a_killed_run_is_one_run_with_each_step_once(tmp_path: Path) -> None:
    """Killed after step 4 with a checkpoint of step 2, in a process whose buffers are lost; then resumed."""
    folder = tmp_path / "run"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(folder), *ALL[1:]], check=False, capture_output=True)
    assert killed.returncode == -9, killed.stderr.decode()
    before = ids(folder)
    log_steps(folder, ALL, 2, [3, 4, 5])
    assert ids(folder) == before and sorted(before) == ["mlflow", "wandb"]
    assert wandb_losses(folder) == {before["wandb"]: losses(1, 2, 3, 4, 5)}
    assert mlflow_losses(before["mlflow"]) == losses(1, 2, 3, 4, 5)
    assert [json.loads(line)["step"] for line in (folder / "metrics.jsonl").open()] == [1, 2, 3, 4, 5]


def test_a_run_that_begins_again_is_another_run(tmp_path: Path) -> None:
    log_steps(tmp_path, ("wandb",), 0, [1, 2])
    first = ids(tmp_path)["wandb"]
    log_steps(tmp_path, ("wandb",), 0, [1])
    assert ids(tmp_path)["wandb"] != first and len(wandb_losses(tmp_path)) == 2
    assert not (tmp_path / "tensorboard").exists()


def test_a_tracker_that_is_added_later_gets_the_earlier_lines(tmp_path: Path) -> None:
    log_steps(tmp_path, ("tensorboard",), 0, [1, 2, 3])
    assert not (tmp_path / "trackers.json").exists()
    log_steps(tmp_path, ("mlflow",), 2, [3])
    assert mlflow_losses(ids(tmp_path)["mlflow"]) == losses(1, 2, 3)


def test_names_settings_and_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("WANDB_PROJECT", "videos")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "videos")
    log_steps(tmp_path, ALL, 0, [1])
    log_result(ALL, tmp_path, "finetune tube", {}, {"top1": 0.75, "undefined": float("nan")})
    run = MlflowClient().get_run(ids(tmp_path)["mlflow"])
    assert MlflowClient().get_experiment(run.info.experiment_id).name == "videos"
    assert (run.info.run_name, run.info.status) == ("pretrain tube", "FINISHED")
    assert run.data.params == {"run.mask.ratio": "0.6", "run.model": "tiny", "seed": "3"}
    assert run.data.metrics["top1"] == 0.75 and "undefined" not in run.data.metrics
    records = [r for path in sorted(tmp_path.glob("wandb/offline-*/*.wandb")) for r in read_wandb(path)]
    begun = next(record.run for record in records if record.WhichOneof("record_type") == "run")
    assert (begun.project, begun.display_name) == ("videos", "pretrain tube")
    assert {item.key: item.value_json for item in begun.config.update}["seed"] == "3"
    summary = {item.key or ".".join(item.nested_key): item.value_json for r in records for item in r.summary.update}
    assert summary["top1"] == "0.75"


def test_no_key_and_nothing_of_the_machine_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", SECRET)
    log_steps(tmp_path / "run", ("wandb", "mlflow"), 0, [1])
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert SECRET.encode() not in written
    assert not list(tmp_path.rglob("requirements.txt")) and not list(tmp_path.rglob("wandb-metadata.json"))


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_an_error_of_a_tracker_is_one_warning(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A server that nobody answers at."""
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(trackers, "_SECONDS", 1)
    log_steps(tmp_path, ("tensorboard", name), 0, [1, 2])
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    warned = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(warned) == 1 and "does not take the values of this run, which goes on without" in warned[0]


def test_a_missing_account_is_not_asked_for_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody may be there to answer, and W&B would wait for ever."""
    import wandb

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    asked: list[bool] = []
    terminal = Terminal()
    monkeypatch.setattr("sys.stdin", terminal)
    monkeypatch.setattr(wandb, "init", lambda **_: asked.append(sys.stdin.isatty()) or 1 / 0)
    External("wandb", tmp_path, "any", {}, fresh=True)
    assert asked == [False] and sys.stdin is terminal


class Flaky:
    """A tracker whose calls fail or not."""

    id, stored = "1", 0

    def __init__(self, *_: Any) -> None:
        self.fails = [False, True, False, True, True, True, False]
        self.calls = 0

    def log(self, step: int, values: Any) -> None:
        self.calls += 1
        if self.fails[self.calls - 1]:
            raise ConnectionError("no route")

    def close(self, finished: bool) -> None:
        raise AssertionError("not called")


def test_a_tracker_that_fails_now_and_then_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flaky = Flaky()
    monkeypatch.setitem(trackers._EXTERNAL, "wandb", ("W&B", lambda *_: flaky))
    external = External("wandb", tmp_path, "any", {}, fresh=True)
    for step in range(1, 8):
        external.log(step, {})
    external.close(finished=True)
    assert flaky.calls == 6  # given up after three failures in a row


def test_what_is_not_installed_is_named_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wandb").mkdir()  # as W&B leaves it: Python would import that folder
    monkeypatch.setattr(trackers, "_is_installed", lambda package: package == "tensorboard")
    check_trackers(["tensorboard"])
    with pytest.raises(
        ConfigError, match=r"trackers: wandb and mlflow not installed: pip install 'stm-video\[trackers\]'"
    ):
        check_trackers(ALL)


def test_processes_beside_the_first_track_nothing(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, 0, Process(1, 2, torch.device("cpu")), ALL) as log:
        log.write(1, {"loss": 1.0})
    assert list(tmp_path.iterdir()) == []
