"""Pretraining with captions, from other weights, and with a teacher: what is logged, saved, and stays the same."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_pretrain import COLORS, read_log, weights
from training_shards import TEXT_WIDTH, make_run, make_shard
from two_processes import pretrain_in_two_processes

from stm.config import PretrainRun
from stm.methods import build_method
from stm.methods.contrast_head import load_contrast_head
from stm.models.weights import zoo
from stm.training.checkpoint import Checkpoints
from stm.training.pretraining import pretrain

CONTRAST = {"hidden": 16, "learnable": True}
SETTINGS = {"epochs": 3, "warmup_epochs": 0, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("shards") / "train"
    return [make_shard(folder / "train-00000.parquet", COLORS * 3)]


def contrast_run(weight: float = 1.0, **changes: Any) -> PretrainRun:
    optimisation = {**SETTINGS, **changes.pop("optimisation", {})}
    return make_run(optimisation=optimisation, contrast={**CONTRAST, "weight": weight}, **changes)


def model_weights(output: Path) -> dict[str, torch.Tensor]:
    found = load_file(output / "weights.safetensors")
    return {name: tensor for name, tensor in found.items() if not name.startswith("contrast.")}


def test_every_value_is_logged_and_the_head_is_saved_beside_the_model(shards: list[Path], tmp_path: Path) -> None:
    run = contrast_run()
    pretrain(run, shards, tmp_path, 7, "cpu")
    line = read_log(tmp_path)[-1]
    assert {"loss", "reconstruction", "contrast", "accuracy", "temperature", "gradient_norm"} <= line.keys()
    assert line["loss"] == pytest.approx(line["reconstruction"] + line["contrast"], rel=1e-5)
    branch = load_contrast_head(tmp_path / "weights.safetensors")
    assert branch.text_model == "made" and branch.text_width == TEXT_WIDTH and branch.head[1].num_batches_tracked == 6
    assert zoo.load(tmp_path / "weights.safetensors").state_dict().keys() == model_weights(tmp_path).keys()


def test_vectors_of_different_text_encoders_are_refused(shards: list[Path], tmp_path: Path) -> None:
    other = make_shard(tmp_path / "train" / "train-00001.parquet", COLORS, prefix="b", text_model="another")
    with pytest.raises(ValueError, match=r"train-00000.*train-00001.*different text encoders"):
        pretrain(contrast_run(), [*shards, other], tmp_path / "run", 7, "cpu")


class Killed(Exception):
    pass


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_a_broken_run_ends_in_the_same_bytes_with_a_head(
    shards: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weight: float
) -> None:
    run, save = contrast_run(weight, checkpoint_every=2), Checkpoints.save

    def save_and_die(self: Checkpoints, step: int, state: dict[str, Any]) -> None:
        save(self, step, state)
        if step == 4:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", save_and_die)
        with pytest.raises(Killed):
            pretrain(run, shards, tmp_path / "broken", 7, "cpu")
    for name in ("broken", "straight"):
        pretrain(run, shards, tmp_path / name, 7, "cpu")
    assert weights(tmp_path / "broken") == weights(tmp_path / "straight")
    logs = [read_log(tmp_path / name) for name in ("broken", "straight")]
    for line in (*logs[0], *logs[1]):
        del line["clips_per_second"]
    assert logs[0] == logs[1]


def test_an_observed_run_trains_the_model_of_a_run_without_contrast_to_the_bit(
    shards: list[Path], tmp_path: Path
) -> None:
    clipped = {"optimisation": {**SETTINGS, "clip_grad": 0.02}}
    pretrain(make_run(**clipped), shards, tmp_path / "plain", 7, "cpu")
    pretrain(contrast_run(0.0, **clipped), shards, tmp_path / "observed", 7, "cpu")
    plain, observed = (model_weights(tmp_path / name) for name in ("plain", "observed"))
    assert plain.keys() == observed.keys()
    assert all(torch.equal(tensor, observed[name]) for name, tensor in plain.items())
    logs = [read_log(tmp_path / name)[-1] for name in ("plain", "observed")]
    for name in ("loss", "reconstruction", "gradient_norm"):
        assert logs[0][name] == logs[1][name]
    assert logs[1]["contrast"] > 0 and "contrast" not in logs[0]


def test_a_control_ends_with_its_initial_encoder_and_a_trained_head(shards: list[Path], tmp_path: Path) -> None:
    control = contrast_run(0.0, reconstruction={"weight": 0})
    pretrain(control, shards, tmp_path / "control", 7, "cpu")
    untrained = {"optimisation": {**SETTINGS, "epochs": 0, "warmup_epochs": 0}}
    pretrain(contrast_run(0.0, **untrained), shards, tmp_path / "start", 7, "cpu")
    encoders = [model_weights(tmp_path / name) for name in ("control", "start")]
    assert all(torch.equal(tensor, encoders[1][name]) for name, tensor in encoders[0].items())
    line = read_log(tmp_path / "control")[-1]
    assert line["contrast"] > 0 and line["loss"] == 0 and line["gradient_norm"] > 0


def test_clips_without_captions_can_be_among_the_others(tmp_path: Path) -> None:
    shard = make_shard(tmp_path / "train" / "train-00000.parquet", COLORS * 2, without_captions=(0, 3, 4))
    mask = {"strategy": "tube", "ratio": 0.5}
    pretrain(contrast_run(mask=mask, reconstruction={"weight": 0}), [shard], tmp_path / "run", 7, "cpu")
    line = read_log(tmp_path / "run")[-1]
    assert line["contrast"] > 0 and "reconstruction" not in line


@pytest.mark.slow
def test_two_processes_train_as_one_on_the_joined_batch(shards: list[Path], tmp_path: Path) -> None:
    pretrain_in_two_processes(contrast_run(processes=2), shards, tmp_path / "two", 7)
    pretrain(contrast_run(), shards, tmp_path / "one", 7, "cpu")
    one, two = (load_file(tmp_path / name / "weights.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        # AdamW's first steps are the gradient's sign: where it is rounding noise, they differ.
        assert (value - two[name]).abs().double().median() < 1e-5, name
    logs = [read_log(tmp_path / name)[-1] for name in ("one", "two")]
    for name in ("loss", "reconstruction", "contrast", "accuracy", "temperature"):
        assert logs[0][name] == pytest.approx(logs[1][name], rel=1e-3), name


def test_a_run_can_start_from_another_s_weights(
    shards: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrain(contrast_run(), shards, tmp_path / "first", 7, "cpu")
    first = str(tmp_path / "first" / "weights.safetensors")
    untrained = {"optimisation": {"epochs": 0, "warmup_epochs": 0}}
    pretrain(make_run(init=first, frames=6, **untrained), shards, tmp_path / "second", 8, "cpu")  # longer clips
    expected = model_weights(tmp_path / "first")
    for name, tensor in model_weights(tmp_path / "second").items():
        assert torch.equal(tensor, expected[name]), name
    receipt = json.loads((tmp_path / "second" / "config.json").read_text())["receipt"]
    assert receipt["init"]["decoder"] is True and len(receipt["init"]["sha256"]) == 64

    deeper = make_run(init=first, decoder_depth=2, **untrained)
    pretrain(deeper, shards, tmp_path / "third", 8, "cpu")
    assert "its decoder differs; the run's decoder is freshly initialised" in capsys.readouterr().err
    torch.manual_seed(8)
    fresh = build_method(deeper).model.state_dict()
    for name, tensor in model_weights(tmp_path / "third").items():
        assert torch.equal(tensor, (expected if name.startswith("encoder.") else fresh)[name]), name

    with pytest.raises(ValueError, match=r"init: .*first.*width 128 instead of 384"):
        pretrain(make_run(init=first, model="small", **untrained), shards, tmp_path / "fourth", 8, "cpu")
    with pytest.raises(ValueError, match=r"init: .*first.*positions joint instead of separable"):
        pretrain(make_run(init=first, positions="separable", **untrained), shards, tmp_path / "fifth", 8, "cpu")


def test_weights_to_start_from_that_have_changed_are_not_resumed(
    shards: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*arguments: object) -> None:
        raise Killed

    source = tmp_path / "source.safetensors"
    torch.manual_seed(1)
    zoo.save(zoo.build(make_run()), source)
    run = make_run(init=str(source))
    with monkeypatch.context() as patch:
        patch.setattr("stm.training.pretraining.write_weights", killed)
        with pytest.raises(Killed):
            pretrain(run, shards, tmp_path / "run", 7, "cpu")
    zoo.save(zoo.build(make_run()), source)
    pretrain(run, shards, tmp_path / "run", 7, "cpu")
    assert "changed: init.sha256" in capsys.readouterr().err


def test_weights_are_hashed_by_what_they_are_and_not_by_their_file(tmp_path: Path) -> None:
    from stm.training.initialise import start_from

    model = zoo.build(make_run())
    zoo.save(model, tmp_path / "a.safetensors")
    zoo.convert(tmp_path / "a.safetensors", tmp_path / "b.pth", "official")
    starts = [start_from(zoo.build(make_run()), str(tmp_path / name)) for name in ("a.safetensors", "b.pth")]
    assert starts[0] == starts[1]
    tensors = load_file(tmp_path / "a.safetensors")
    tensors["encoder.norm.bias"] += 1e-3
    header = {"stm": json.dumps({"architecture": model.architecture.__dict__})}
    save_file(tensors, tmp_path / "c.safetensors", header)
    assert start_from(zoo.build(make_run()), str(tmp_path / "c.safetensors")).sha256 != starts[0].sha256


@pytest.mark.slow
def test_a_teacher_guides_a_run_and_is_in_neither_weights_nor_checkpoints(
    shards: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[set[str]] = []
    save = Checkpoints.save
    monkeypatch.setattr(
        Checkpoints, "save", lambda self, step, state: (saved.append(set(state["model"])), save(self, step, state))[1]
    )
    clip = Path(__file__).parents[2] / "stm" / "assets" / "demo-clip"
    run = make_run(mask={"strategy": "attention", "ratio": 0.5}, teacher={"model": f"local-dir:{clip}"})
    pretrain(run, shards, tmp_path, 7, "cpu")
    tube = build_method(make_run(mask={"strategy": "tube", "ratio": 0.5}))
    assert model_weights(tmp_path).keys() == tube.model.state_dict().keys()
    assert saved and all(names == tube.state_dict().keys() for names in saved)
    assert read_log(tmp_path)[-1]["reconstruction"] > 0
    receipt = json.loads((tmp_path / "config.json").read_text())["receipt"]
    assert receipt["teacher"]["model"] == "local-dir:demo-clip" and len(receipt["teacher"]["weights_sha256"]) == 64
