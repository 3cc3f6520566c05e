"""Pretraining from shards: same bytes from the same arguments, whatever happens on the way."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch._dynamo.utils import counters
from training_shards import make_run, make_shard
from two_processes import pretrain_in_two_processes

from stm.config import PretrainRun
from stm.data.loader import Batch
from stm.methods import build_method
from stm.training.batches import feed_media
from stm.training.pretraining import open_clips, pretrain

COLORS = ["red", "green", "blue"]
PROGRAM = """
import sys
from pathlib import Path
from stm.config import PretrainRun
from stm.jobs.messages import configure_messages
from stm.training.pretraining import pretrain

configure_messages()
run, output, *shards = sys.argv[1:]
pretrain(PretrainRun.model_validate_json(run), [Path(s) for s in shards], Path(output), 7, "cpu")
"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("shards") / "train"
    return [
        make_shard(folder / "train-00000.parquet", COLORS * 2, seed=0, prefix="a"),
        make_shard(folder / "train-00001.parquet", COLORS, seed=1, prefix="b"),
    ]


def read_log(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def weights(output: Path) -> bytes:
    return (output / "weights.safetensors").read_bytes()


def start(run: PretrainRun, shards: list[Path], output: Path) -> subprocess.Popen[bytes]:
    """`pretrain` in a process of its own."""
    arguments = [run.model_dump_json(), str(output), *map(str, shards)]
    # The same number of threads everywhere: sums are taken in another order with another number.
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.Popen([sys.executable, "-c", PROGRAM, *arguments], env=environment, stderr=subprocess.PIPE)


def test_weights_config_and_log_are_written(shards: list[Path], tmp_path: Path) -> None:
    run = make_run(optimisation={"epochs": 3})
    pretrain(run, shards, tmp_path / "run", 7, "cpu")
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "config.json", "metrics.jsonl", "tensorboard", "weights.safetensors",
    ]  # fmt: skip
    trained = load_file(tmp_path / "run" / "weights.safetensors")
    assert trained.keys() == build_method(run).model.state_dict().keys()
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert PretrainRun.model_validate(config["run"]) == run
    assert config["receipt"]["step"] == 6 and config["receipt"]["seed"] == 7  # 9 clips are 2 batches of 4
    assert sorted(config["receipt"]["data"]) == ["train-00000", "train-00001"]
    (line,) = read_log(tmp_path / "run")
    assert line["step"] == 6 and line["epoch"] == 3 and line["loss"] > 0 and line["clips_per_second"] > 0


def test_the_loss_falls_below_that_of_predicting_the_mean(tmp_path: Path) -> None:
    shard = make_shard(tmp_path / "train" / "train-00000.parquet", ["red"] * 4)
    settings = {"epochs": 40, "learning_rate": 0.128, "warmup_epochs": 5}
    run = make_run(optimisation=settings, augmentation={"crop": "center", "flip": False})
    pretrain(run, [shard], tmp_path / "run", 7, "cpu")
    assert read_log(tmp_path / "run")[-1]["loss"] < 0.9  # targets have variance 1


def test_neither_workers_nor_checkpoints_change_a_byte(shards: list[Path], tmp_path: Path) -> None:
    base = make_run()
    for name, changes in {"a": {}, "b": {"workers": 2}, "c": {"checkpoint_every": 1, "checkpoints_kept": 1}}.items():
        pretrain(make_run(**changes), shards, tmp_path / name, 7, "cpu")
    assert weights(tmp_path / "a") == weights(tmp_path / "b") == weights(tmp_path / "c")
    pretrain(base, shards, tmp_path / "d", 8, "cpu")
    assert weights(tmp_path / "a") != weights(tmp_path / "d")
    pretrain(make_run(seed=8), shards, tmp_path / "e", 7, "cpu")  # a run's own seed goes first
    assert weights(tmp_path / "d") == weights(tmp_path / "e")


def test_resizing_on_the_device_is_the_same_training_but_for_rounding(shards: list[Path], tmp_path: Path) -> None:
    """Crops of these shards are smaller than the model's pictures: all are enlarged."""
    places = {"video": {}, "crop": {"resize_on": "device"}, "jpegs": {"resize_on": "device", "decode_on": "device"}}
    for name, changes in places.items():
        run = make_run(**changes)
        assert name in open_clips(run, shards, 7)[0][0]
        pretrain(run, shards, tmp_path / name, 7, "cpu")
    losses = [read_log(tmp_path / name)[-1]["loss"] for name in places]
    assert losses[0] == pytest.approx(losses[1], rel=0.01)
    assert weights(tmp_path / "crop") == weights(tmp_path / "jpegs")  # on a CPU both are decoded by libjpeg-turbo


def test_a_stopped_run_that_decodes_and_resizes_on_the_device_ends_in_the_same_bytes(
    shards: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device: dict[str, Any] = {"resize_on": "device", "decode_on": "device"}
    run = make_run(**device, checkpoint_every=1)

    def stopping(*arguments: Any) -> Callable[[int], Iterator[Batch]]:
        return lambda step: islice(feed_media(*arguments)(step), 3)  # the fourth step finds no batch

    with monkeypatch.context() as patch:
        patch.setattr("stm.training.pretraining.feed_media", stopping)
        with pytest.raises(StopIteration):
            pretrain(run, shards, tmp_path / "stopped", 7, "cpu")
    assert (tmp_path / "stopped" / "checkpoints" / "step-000000003.pt").exists()
    pretrain(run, shards, tmp_path / "stopped", 7, "cpu")
    pretrain(make_run(**device, workers=2), shards, tmp_path / "straight", 7, "cpu")
    assert weights(tmp_path / "stopped") == weights(tmp_path / "straight")


def test_no_epochs_save_the_initial_weights_of_the_seed(shards: list[Path], tmp_path: Path) -> None:
    run = make_run(optimisation={"epochs": 0, "batch_size": 512})
    pretrain(run, shards, tmp_path, 7, "cpu")
    torch.manual_seed(7)
    expected = build_method(run).model.state_dict()
    for name, value in load_file(tmp_path / "weights.safetensors").items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize(("repeats", "steps"), [(1, 2), (2, 4)])
def test_an_epoch_is_the_samples_that_fill_batches(
    shards: list[Path], tmp_path: Path, repeats: int, steps: int
) -> None:
    pretrain(make_run(repeats=repeats, optimisation={"epochs": 1}), shards, tmp_path, 7, "cpu")
    assert read_log(tmp_path)[-1]["step"] == steps


def test_accumulation_is_one_batch_to_rounding(shards: list[Path], tmp_path: Path) -> None:
    for accumulate in (1, 2):
        settings = {"accumulate": accumulate, "epochs": 1, "warmup_epochs": 0, "learning_rate": 1e-3}
        pretrain(make_run(optimisation=settings), shards, tmp_path / str(accumulate), 7, "cpu")
    one, two = (load_file(tmp_path / name / "weights.safetensors") for name in ("1", "2"))
    for name, value in one.items():
        # AdamW's first steps are the gradient's sign: where it is rounding noise, they differ.
        assert (value - two[name]).abs().median() < 1e-6, name


@pytest.mark.slow
def test_compilation_is_one_graph_and_no_change_in_computation(
    shards: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the step's graph captured but run by torch's own kernels, so that no compiler of C++ is needed."""
    settings = {"epochs": 1, "warmup_epochs": 0, "learning_rate": 1e-3}
    pretrain(make_run(optimisation=settings), shards, tmp_path / "plain", 7, "cpu")
    compiled = nn.Module.compile
    monkeypatch.setattr(
        nn.Module, "compile", lambda self, **kw: compiled(self, backend="aot_eager", fullgraph=True, **kw)
    )
    counters.clear()
    pretrain(make_run(optimisation=settings, compile=True), shards, tmp_path / "compiled", 7, "cpu")
    assert counters["stats"]["unique_graphs"] == 1  # and not one for each batch's keys and captions
    one, two = (load_file(tmp_path / name / "weights.safetensors") for name in ("plain", "compiled"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert (value - two[name]).abs().median() < 1e-6, name


def test_fewer_clips_than_a_batch_are_refused_with_both_numbers(shards: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"9 clips, fewer than .*batch_size = 16; set batch_size to 9"):
        pretrain(make_run(optimisation={"batch_size": 16}), shards, tmp_path, 7, "cpu")


def test_repeats_must_fit_into_a_pass() -> None:
    with pytest.raises(ValueError, match=r"multiple of accumulate x processes x repeats = 2 x 1 x 4"):
        make_run(repeats=4, optimisation={"accumulate": 2})


def test_a_run_of_several_processes_must_be_started_as_such(shards: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"2 processes .*, but 1 were started.*torchrun"):
        pretrain(make_run(processes=2), shards, tmp_path, 7, "cpu")


def test_changed_data_are_not_resumed(
    shards: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    run, other = make_run(), make_shard(tmp_path / "train" / "train-00000.parquet", COLORS * 2, seed=9)
    with monkeypatch.context() as patch:
        patch.setattr("stm.training.pretraining.write_weights", killed)
        with pytest.raises(KeyboardInterrupt):
            pretrain(run, [other], tmp_path / "run", 7, "cpu")
    assert list((tmp_path / "run" / "checkpoints").glob("*.pt"))
    pretrain(run, shards, tmp_path / "run", 7, "cpu")
    assert "changed: data.train-00000" in capsys.readouterr().err
    pretrain(run, shards, tmp_path / "expected", 7, "cpu")
    assert weights(tmp_path / "run") == weights(tmp_path / "expected")


def wait_for_checkpoint(process: subprocess.Popen[bytes], output: Path) -> None:
    """Until a checkpoint is there and the run is not finished."""
    deadline = time.monotonic() + 120
    while not list(output.glob("checkpoints/step-*.pt")):
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.005)


LONG = {"epochs": 15, "accumulate": 2}


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_kill_9_and_again_gives_the_same_bytes(
    shards: list[Path], tmp_path: Path, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(optimisation=LONG, checkpoint_every=4, workers=workers)
    killed = start(run, shards, tmp_path / "killed")
    wait_for_checkpoint(killed, tmp_path / "killed")
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert not (tmp_path / "killed" / "weights.safetensors").exists()
    pretrain(run, shards, tmp_path / "killed", 7, "cpu")
    assert "resuming from step" in capsys.readouterr().err
    pretrain(run, shards, tmp_path / "straight", 7, "cpu")
    assert weights(tmp_path / "killed") == weights(tmp_path / "straight")
    logs = [read_log(tmp_path / name) for name in ("killed", "straight")]
    for line in (*logs[0], *logs[1]):
        del line["clips_per_second"]
    assert logs[0] == logs[1]


@pytest.mark.slow
def test_sigterm_to_the_whole_group_saves_and_leaves_with_a_code(shards: list[Path], tmp_path: Path) -> None:
    run = make_run(optimisation=LONG, checkpoint_every=3, workers=2)
    process = start(run, shards, tmp_path / "run")
    wait_for_checkpoint(process, tmp_path / "run")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) >= 2
    for child in children:  # as a batch system does
        os.kill(int(child), signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    _, messages = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, messages
    assert b"SIGTERM: saved after step" in messages
    pretrain(run, shards, tmp_path / "run", 7, "cpu")
    pretrain(run, shards, tmp_path / "straight", 7, "cpu")
    assert weights(tmp_path / "run") == weights(tmp_path / "straight")


@pytest.mark.slow
def test_two_processes_train_as_two_accumulated_passes(shards: list[Path], tmp_path: Path) -> None:
    settings = {"epochs": 1, "warmup_epochs": 0, "learning_rate": 1e-3}
    pretrain_in_two_processes(make_run(processes=2, optimisation=settings), shards, tmp_path / "two", 7)
    pretrain(make_run(optimisation={**settings, "accumulate": 2}), shards, tmp_path / "one", 7, "cpu")
    one, two = (load_file(tmp_path / name / "weights.safetensors") for name in ("one", "two"))
    for name, value in one.items():
        assert (value - two[name]).abs().median() < 1e-6, name
    logs = [read_log(tmp_path / name)[-1] for name in ("one", "two")]
    assert logs[0]["loss"] == pytest.approx(logs[1]["loss"], rel=1e-4)
    assert logs[0]["gradient_norm"] == pytest.approx(logs[1]["gradient_norm"], rel=1e-3)
