"""An evaluation in several processes that is killed, stopped or fails, as its job starts it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from ending_jobs import damage
from test_launch import left_of, wait_for, workers_under
from training_shards import make_run, make_shard

from stm.config import FineTune
from stm.evaluation import EvaluationInputs, evaluate
from stm.training.pretraining import pretrain

pytestmark = pytest.mark.slow

PROGRAM = """
import json, sys
from pathlib import Path
from stm.config import FineTune, PretrainRun
from stm.evaluation import EvaluationInputs
from stm.evaluation.launch import run_evaluation

task, run, output, weights, train, test = sys.argv[1:]
inputs = EvaluationInputs(Path(weights), [Path(test)], Path(output), 3, train=[Path(train)], device="cpu")
run_evaluation(FineTune.model_validate_json(task), PretrainRun.model_validate_json(run), inputs)
"""
RUN = make_run(optimisation={"epochs": 0}, checkpoint_every=3)
EPOCHS = 60  # of one step each; long enough to be stopped
NOISE = {"auto_augment": None, "mixup": 0.8, "cutmix": 1.0, "erasing": 0.5}


def task(processes: int, epochs: int) -> FineTune:
    steps = {"batch_size": 12, "epochs": epochs, "learning_rate": 0.005, "warmup_epochs": 1}
    values = {"task": "finetune", "augmentation": NOISE, "optimisation": steps, "drop_path": 0.3, "head_dropout": 0.3}
    return FineTune.model_validate({**values, "processes": processes})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Fifteen training clips, nine test clips, and weights that nothing has trained."""
    folder, labels = tmp_path_factory.mktemp("evaluation"), ["red", "green", "blue"]
    train = make_shard(folder / "train/train-00000.parquet", labels * 5, seed=0, prefix="train")
    test = make_shard(folder / "test/test-00000.parquet", labels * 3, seed=1, prefix="test")
    pretrain(RUN, [train], folder / "run", 3, "cpu")
    return {"train": train, "test": test, "weights": folder / "run/weights.safetensors"}


def evaluate_alone(settings: FineTune, made: dict[str, Path], output: Path) -> None:
    evaluate(
        settings, RUN, EvaluationInputs(made["weights"], [made["test"]], output, 3, train=[made["train"]], device="cpu")
    )


def start(settings: FineTune, made: dict[str, Path], output: Path) -> "subprocess.Popen[str]":
    output.mkdir(parents=True, exist_ok=True)
    arguments = [settings.model_dump_json(), RUN.model_dump_json(), str(output)]
    arguments += [str(made[name]) for name in ("weights", "train", "test")]
    return subprocess.Popen([sys.executable, "-c", PROGRAM, *arguments], stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def reference(made: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process writes."""
    folder = tmp_path_factory.mktemp("one")
    evaluate_alone(task(1, EPOCHS), made, folder)
    return folder


def check_same(folder: Path, reference: Path) -> None:
    found, expected = (json.loads((path / "metrics.json").read_text()) for path in (folder, reference))
    for metrics in (found, expected):
        for settings in (metrics["settings"], metrics["receipt"]["settings"]["task"]):
            settings.pop("processes")
    assert found == expected
    rows, right = (pq.read_table(path / "predictions.parquet").to_pydict() for path in (folder, reference))
    assert rows["prediction"] == right["prediction"]
    np.testing.assert_allclose(rows["probability"], right["probability"], atol=1e-3)
    assert not (folder / "checkpoints").exists() and not (folder / "launch.json").exists()


def test_a_process_that_is_killed_is_started_again_and_the_numbers_are_those_of_one(
    made: dict[str, Path], reference: Path, tmp_path: Path
) -> None:
    process = start(task(2, EPOCHS), made, tmp_path / "two")
    wait_for(process, tmp_path / "two", "checkpoints/step-*.pt")
    os.kill(workers_under(process.pid)[-1], signal.SIGKILL)
    _, messages = process.communicate(timeout=300)
    assert process.returncode == 0, messages
    assert "resuming from step" in messages
    check_same(tmp_path / "two", reference)


def test_two_processes_stop_at_a_signal_and_one_goes_on(made: dict[str, Path], reference: Path, tmp_path: Path) -> None:
    """With the same random numbers: those of the joint batch."""
    process = start(task(2, EPOCHS), made, tmp_path / "two")
    wait_for(process, tmp_path / "two", "checkpoints/step-*.pt")
    process.send_signal(signal.SIGTERM)
    _, messages = process.communicate(timeout=150)
    assert process.returncode == 128 + signal.SIGTERM, messages
    assert messages.count("SIGTERM: saved after step") == 1
    assert left_of(tmp_path / "two") == [] and not (tmp_path / "two/metrics.json").exists()
    evaluate_alone(task(1, EPOCHS), made, tmp_path / "two")
    check_same(tmp_path / "two", reference)


def test_an_error_in_the_test_of_one_process_ends_all_within_seconds(made: dict[str, Path], tmp_path: Path) -> None:
    """The last clip is in the second batch, which the second process has, while the first one waits for its results."""
    test = damage(make_shard(tmp_path / "test/test-00000.parquet", ["red", "blue"] * 18))
    process = start(task(2, 1), {**made, "test": test}, tmp_path / "two")
    wait_for(process, tmp_path / "two", "classifier.safetensors")
    begun = time.monotonic()
    _, messages = process.communicate(timeout=120)
    assert time.monotonic() - begun < 40
    assert process.returncode == 1
    assert "clip-035" in messages and "not retried: the error above would recur" in messages
    assert left_of(tmp_path / "two") == [] and not (tmp_path / "two/metrics.json").exists()
