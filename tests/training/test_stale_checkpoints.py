"""Checkpoints of other settings, data, seeds or models are never resumed; those of another division of the work are."""

import hashlib
import json
import shutil
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from changed_settings import changes
from training_shards import make_run, make_shard

from stm.config import LanguageRun, PretrainRun
from stm.training.initialise import Start, hash_tensors
from stm.training.pretraining import make_plan, pretrain

# How fast, how safely, with how much memory and where a run is done; how its work is divided, which a cluster may change.
NO_RESULT = {"workers", "kept_gigabytes", "checkpoint_every", "checkpoints_kept", "dataset", "seeds"}
NO_RESULT |= {"processes", "nodes", "parallel", "gradient_checkpointing"}
TOLD_APART = {"seed"}  # what holds is the seed that the run is given

MASKED = PretrainRun.model_validate({"teacher": {"model": "any"}, "contrast": {}})
TAUGHT: dict[str, Any] = {"teacher": {"model": "any"}, "language": {}, "images": {"datasets": ["others"]}}
RUNS = {
    "mae": MASKED,
    "stm": LanguageRun.model_validate({**TAUGHT, "method": "stm", "spatio_temporal": {}}),
    "clusterstm": LanguageRun.model_validate({**TAUGHT, "method": "clusterstm", "cluster": {}}),
}


def origin(run: Any = MASKED, **more: Any) -> Any:
    """What checkpoints of a run are held against."""
    given: dict[str, Any] = {"seed": 0, "data": {"train-00000": "a"}, "start": None, "teacher": {"model": "a"}} | more
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # values that no config could have
        return make_plan(run, 10, given["seed"], given["data"], given["start"], given["teacher"], Path("run")).origin


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_each_setting_that_decides_tells_checkpoints_apart(run: PretrainRun | LanguageRun) -> None:
    before = origin(run)
    apart = {key for key, changed in changes(run) if origin(changed) != before}
    assert apart == {key for key, _ in changes(run)} - NO_RESULT - TOLD_APART


def test_seed_data_first_weights_and_teacher_tell_checkpoints_apart() -> None:
    others: list[dict[str, Any]] = [
        {"seed": 1},
        {"data": {"train-00000": "b"}},
        {"data": {"train-00001": "a"}},
        {"teacher": {"model": "b"}},
        {"teacher": None},
        {"start": Start("a", decoder=False)},
        {"start": Start("b", decoder=False)},
        {"start": Start("a", decoder=True)},
    ]
    found = [origin(), *(origin(**other) for other in others)]
    assert all(one != other for number, one in enumerate(found) for other in found[:number])


def test_the_hash_of_first_weights_is_of_names_shapes_and_values() -> None:
    first = {"a": torch.zeros(2, 3), "b": torch.ones(2)}
    others = [
        {**first, "a": torch.zeros(3, 2)},
        {**first, "b": torch.tensor([1.0, 1.0001])},
        {"a": first["a"], "c": first["b"]},
        {**first, "b": torch.ones(2, dtype=torch.float64)},
        {"a": first["a"]},
    ]
    assert len({hash_tensors(tensors) for tensors in (first, *others)}) == 1 + len(others)
    assert hash_tensors(dict(reversed(first.items()))) == hash_tensors(first)


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shard(tmp_path_factory.mktemp("shards") / "train" / "train-00000.parquet", ["red", "green"] * 3)


@pytest.fixture(scope="module")
def killed(shard: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed when it was trained and nothing was written yet but its checkpoints."""

    def kill(*_: object) -> None:
        raise KeyboardInterrupt

    folder = tmp_path_factory.mktemp("killed")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setitem(pretrain.__globals__, "write_weights", kill)
        pretrain(make_run(), [shard], folder, 7, "cpu")
    assert list((folder / "checkpoints").glob("*.pt"))
    return folder


def train(shard: Path, folder: Path, seed: int = 7, **changes: object) -> bytes:
    pretrain(make_run(**changes), [shard], folder, seed, "cpu")
    return (folder / "weights.safetensors").read_bytes()


@pytest.fixture(scope="module")
def unchanged(shard: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return train(shard, tmp_path_factory.mktemp("unchanged"))


@pytest.mark.parametrize(
    "change",
    [
        {"optimisation": {"learning_rate": 0.02}},
        {"mask": {"strategy": "tube", "ratio": 0.5}},
        {"augmentation": {"flip": False}},
        {"precision": "bf16"},
        {"seed": 8},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_killed_run_with_another_setting_starts_anew(
    shard: Path, killed: Path, unchanged: bytes, tmp_path: Path, change: dict[str, Any]
) -> None:
    shutil.copytree(killed, tmp_path / "killed")
    found = train(shard, tmp_path / "killed", **change)
    assert found == train(shard, tmp_path / "clean", **change)
    assert found != unchanged
    assert list(tmp_path.glob("killed/checkpoints-of-*/step-*.pt")), "they are put aside, not thrown away"
    assert train(shard, tmp_path / "killed") == unchanged  # changed back: resumed, as the next test shows


def test_a_killed_run_with_nothing_changed_is_resumed(
    shard: Path, killed: Path, unchanged: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(killed, tmp_path / "killed")
    assert train(shard, tmp_path / "killed") == unchanged
    assert "step 2 of 2" in capsys.readouterr().err


def test_a_setting_changed_and_changed_back_loses_no_step(
    shard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three settings in turn, each killed after its training: each resumes with its own checkpoints and its own log."""
    changes: list[dict[str, Any]] = [{}, {"augmentation": {"flip": False}}, {"optimisation": {"learning_rate": 0.02}}]
    logs: dict[int, str] = {}

    def kill(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setitem(pretrain.__globals__, "write_weights", kill)
        for number, change in enumerate([*changes, *changes]):
            with pytest.raises(KeyboardInterrupt):
                pretrain(make_run(**change), [shard], tmp_path / "run", 7, "cpu")
            assert ("resuming from step 2 of 2" in capsys.readouterr().err) == (number >= len(changes))
            log = (tmp_path / "run/metrics.jsonl").read_text()
            assert logs.setdefault(number % len(changes), log) == log
            assert len(list((tmp_path / "run/tensorboard").iterdir())) == 1 + number // len(changes)
    assert len(set(logs.values())) == len(changes)
    assert train(shard, tmp_path / "run") == train(shard, tmp_path / "clean")
    assert len(list(tmp_path.glob("run/checkpoints-of-*/step-000000002.pt"))) == 2, "those of the others stay"
    assert not (tmp_path / "run/checkpoints").exists()


def test_a_checkpoint_of_another_layout_is_put_aside_once(
    shard: Path, killed: Path, unchanged: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As another version of the code would have written it, with the same settings."""
    damages: dict[str, Callable[[dict[str, Any]], Any]] = {
        "renamed": lambda s: s["model"].update(other=s["model"].pop(next(iter(s["model"])))),
        "shape": lambda s: s["model"].update({name: value[None] for name, value in s["model"].items()}),
        "a part less": lambda s: s.pop("meter"),
        "another group": lambda s: s["optimizer"]["param_groups"].append(
            s["optimizer"]["param_groups"].pop(0) | {"params": [0]}
        ),
        "no state at all": lambda s: s.clear(),
    }
    for name, damage in damages.items():
        folder = tmp_path / name
        shutil.copytree(killed, folder)
        path = folder / "checkpoints/step-000000002.pt"
        state = torch.load(path, weights_only=True)
        damage(state)
        torch.save(state, path)
        write_sum(path)
        assert train(shard, folder) == unchanged
        (aside,) = folder.glob("checkpoints-of-*/step-000000002.pt")
        messages = capsys.readouterr().err
        assert str(aside.parent) in messages and "resuming" not in messages
        assert hashlib.sha256(aside.read_bytes()).hexdigest() in aside.with_name(f"{aside.name}.sha256").read_text()


def write_sum(path: Path) -> None:
    path.with_name(f"{path.name}.sha256").write_text(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n")


def test_checkpoints_of_an_earlier_version_without_history_are_resumed(
    shard: Path, killed: Path, unchanged: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(killed, tmp_path / "run")
    path = tmp_path / "run/checkpoints/step-000000002.pt"
    state = torch.load(path, weights_only=True)
    torch.save({key: value for key, value in state.items() if key not in ("history", "epochs_ended")}, path)
    write_sum(path)
    assert train(shard, tmp_path / "run") == unchanged
    assert "resuming from step 2 of 2" in capsys.readouterr().err


def test_resuming_with_other_versions_is_said_and_kept_in_the_receipt(
    shard: Path, killed: Path, unchanged: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(killed, tmp_path / "run")
    path = tmp_path / "run/checkpoints/step-000000002.pt"
    state = torch.load(path, weights_only=True)
    state["history"][0]["versions"]["timm"] = "0.9.9"
    torch.save(state, path)
    write_sum(path)
    assert train(shard, tmp_path / "run") == unchanged
    now = version("timm")
    assert (
        f"warning: the steps up to here were computed with other versions (timm 0.9.9 -> {now})"
        in capsys.readouterr().err
    )
    receipt = json.loads((tmp_path / "run/config.json").read_text())["receipt"]
    assert [(part["step"], part["versions"]["timm"]) for part in receipt["resumed"]] == [(0, "0.9.9"), (2, now)]
    # A run that was resumed with the same versions has the receipt of one that was not.
    shutil.copytree(killed, tmp_path / "same")
    assert train(shard, tmp_path / "same") == unchanged
    assert "resumed" not in json.loads((tmp_path / "same/config.json").read_text())["receipt"]
    assert "other versions" not in capsys.readouterr().err
