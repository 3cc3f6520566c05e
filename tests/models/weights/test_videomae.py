"""VideoMAE's own `.pth` files: against a plain network in their format, and against hostile ones."""

import argparse
import os
import pickle
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import official_peer as peer
import pytest
import torch
from model_parts import TINY, Head, double, draw, numbers
from torch import Tensor

from stm.models.vit import Architecture, VideoEncoder, VideoMAE
from stm.models.weights import zoo
from stm.models.weights.videomae import read_official, to_official, write_official


def save(state: Any, path: Path, **more: Any) -> Path:
    torch.save({"model": state, **more}, path)
    return path


@pytest.fixture
def pretrained(tmp_path: Path) -> tuple[dict[str, Tensor], Path]:
    state = peer.pretraining_state(48, 2, 24, 1, patch=8)
    return state, save(state, tmp_path / "checkpoint.pth", epoch=799, optimizer={"state": {}, "param_groups": []})


def check_pretraining(state: Mapping[str, Tensor], model: VideoMAE) -> None:
    a = model.architecture
    video, clip, masked = draw(a)
    state, kept = double(state), numbers(~masked)
    exact = model.double().eval()
    unit = video.double() / 255
    features = peer.encode(clip, masked, state, a.heads)
    expected = peer.reconstruct(clip, masked, state, a.heads, a.decoder_heads)
    # Our table of positions and ImageNet's statistics are float32: so is the agreement, though all else is float64.
    torch.testing.assert_close(exact.encoder(unit, kept), features, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(exact(unit, kept, numbers(masked)), expected, rtol=1e-5, atol=2e-6)


def test_a_pretraining_checkpoint_computes_here_what_it_does_there(pretrained) -> None:
    state, path = pretrained
    model = zoo.load_any(path, TINY)
    assert isinstance(model, VideoMAE)
    check_pretraining(state, model)
    longer = zoo.load_any(path, replace(TINY, frames=6, image_size=48))
    assert isinstance(longer, VideoMAE)
    check_pretraining(state, longer)


def test_a_fine_tuned_checkpoint_computes_here_what_it_does_there(tmp_path: Path) -> None:
    state = peer.classifier_state(48, 2, classes=7, patch=8)
    torch.save({"module": state}, tmp_path / "deepspeed.pth")
    weights = zoo.read(tmp_path / "deepspeed.pth", TINY)
    assert (weights.kind, weights.classes) == ("classifier", 7)
    model = Head(VideoEncoder(weights.architecture), 7)
    model.load_state_dict(dict(weights.tensors))
    video, clip, _ = draw(TINY)
    found = model.double().eval()(video.double() / 255)
    torch.testing.assert_close(found, peer.classify(clip, double(state), 3), rtol=1e-5, atol=2e-6)
    encoder = zoo.load_encoder(tmp_path / "deepspeed.pth", architecture=TINY)
    assert torch.equal(encoder.state_dict()["blocks.1.mlp.fc2.weight"], state["blocks.1.mlp.fc2.weight"])


@pytest.mark.slow
def test_checkpoints_of_base_s_size_need_no_architecture(tmp_path: Path) -> None:
    state = peer.pretraining_state(768, 12, 384, 4, patch=16)
    model = zoo.load_any(save(state, tmp_path / "base.pth"))
    assert isinstance(model, VideoMAE)
    assert model.architecture == Architecture(224, 16, 2, 16, 768, 12, 12, 384, 4, 6)
    video, clip, masked = draw(model.architecture, batch=1, visible=160)
    with torch.inference_mode():
        expected = peer.reconstruct(clip.float(), masked, state, 12, 6)
        found = model.eval()(video, numbers(~masked), numbers(masked))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=3e-5)
        del expected, found
        state = peer.classifier_state(768, 12, classes=400, patch=16)
        weights = zoo.read(save(state, tmp_path / "tuned.pth"))
        tuned = Head(VideoEncoder(weights.architecture), 400).eval()
        tuned.load_state_dict(dict(weights.tensors))
        torch.testing.assert_close(tuned(video), peer.classify(clip.float(), state, 12), rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize("kind", ["pretraining", "classifier"])
def test_official_weights_come_back_bit_for_bit(tmp_path: Path, kind: str) -> None:
    make = {
        "pretraining": lambda: peer.pretraining_state(48, 2, 24, 1, patch=8),
        "classifier": lambda: peer.classifier_state(48, 2, 7, patch=8),
    }
    state = make[kind]()
    ours = zoo.convert(save(state, tmp_path / "a.pth"), tmp_path / "a.safetensors", "stm", TINY)
    zoo.convert(ours, tmp_path / "b.pth", "official")
    back = torch.load(tmp_path / "b.pth", weights_only=True)["model"]
    assert back.keys() == state.keys()
    assert all(torch.equal(tensor, back[name]) for name, tensor in state.items())


def test_our_weights_come_back_but_for_the_keys_biases_which_change_nothing(tmp_path: Path) -> None:
    model = VideoMAE(TINY)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("qkv.bias"):
                parameter.normal_()
    zoo.save(model, tmp_path / "a.safetensors")
    zoo.convert(tmp_path / "a.safetensors", tmp_path / "a.pth", "official")
    again = zoo.load_any(tmp_path / "a.pth")
    assert again.architecture == TINY, "heads, frames and size are in the file"
    for name, tensor in model.state_dict().items():
        back = again.state_dict()[name]
        if name.endswith("qkv.bias"):
            query, key, value = back.chunk(3)
            assert key.abs().max() == 0
            back = torch.cat([query, tensor.chunk(3)[1], value])
        assert torch.equal(tensor, back), name
    check_pretraining(to_official(zoo.read(tmp_path / "a.safetensors")), model)


def test_the_same_weights_give_the_same_bytes_whatever_the_name(tmp_path: Path) -> None:
    weights = zoo.read(save(peer.classifier_state(48, 2, 7, patch=8), tmp_path / "in.pth"), TINY)
    write_official(weights, tmp_path / "a.pth")
    write_official(weights, tmp_path / "another.pth")
    assert (tmp_path / "a.pth").read_bytes() == (tmp_path / "another.pth").read_bytes()


def test_training_arguments_tell_the_clip_and_the_picture(tmp_path: Path) -> None:
    arguments = argparse.Namespace(input_size=112, num_frames=8, model="pretrain_videomae_small", lr=1e-3, betas=(0.9,))
    state = peer.pretraining_state(384, 1, 192, 1, patch=16)
    found = read_official(save(state, tmp_path / "a.pth", args=arguments)).architecture
    assert (found.image_size, found.frames, found.heads, found.decoder_heads) == (112, 8, 6, 3)
    found = read_official(save(state, tmp_path / "a.pth", args=argparse.Namespace(input_size="x"))).architecture
    assert (found.image_size, found.frames) == (224, 16)


def test_half_precision_and_a_stored_table_of_positions_are_read(tmp_path: Path) -> None:
    state = {n: t.half() for n, t in peer.classifier_state(48, 2, 7, patch=8).items()}
    weights = zoo.read(save({**state, "pos_embed": peer.sines(32, 48)}, tmp_path / "a.pth"), TINY)
    assert {t.dtype for t in weights.tensors.values()} == {torch.float32}
    learnt = {**state, "pos_embed": torch.randn(1, 32, 48)}
    with pytest.raises(zoo.WeightsError, match=r"a\.pth.*1 not expected: pos_embed"):
        zoo.read(save(learnt, tmp_path / "a.pth"), TINY)


def test_an_encoder_without_its_decoder_is_read_with_and_without_prefix(pretrained, tmp_path: Path) -> None:
    state, _ = pretrained
    alone = {name: tensor for name, tensor in state.items() if name.startswith("encoder.")}
    bare = {name.removeprefix("encoder."): tensor for name, tensor in alone.items()}
    for content in (alone, bare):
        encoder = zoo.load_any(save(content, tmp_path / "a.pth"), TINY)
        assert isinstance(encoder, VideoEncoder)
        assert torch.equal(encoder.norm.bias, state["encoder.norm.bias"])


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("how", ["torch", "plain pickle", "newer pickle"])
def test_a_file_with_code_is_refused_and_the_code_not_run(tmp_path: Path, how: str) -> None:
    path, content = tmp_path / "evil.pth", {"model": {}, "args": Payload(tmp_path / "ran")}
    if how == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content, protocol=2 if how == "plain pickle" else 5))
    named = "" if how == "newer pickle" else r"\(posix.system\) "
    with pytest.raises(zoo.WeightsError, match=rf"evil\.pth: .*more than weights {named}and loading it could run code"):
        zoo.load_any(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("length", [4, 300, 5000])
def test_a_torn_file_is_an_error_that_names_it(pretrained, length: int) -> None:
    _, path = pretrained
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(zoo.WeightsError, match=r"checkpoint\.pth: (cannot be loaded|neither)"):
        zoo.load_any(path, TINY)


def test_files_with_other_things_say_what_they_hold(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save([torch.zeros(2)], path)
    with pytest.raises(zoo.WeightsError, match=r"a\.pth: holds a list"):
        zoo.load_any(path)
    with pytest.raises(zoo.WeightsError, match=r"a\.pth: is not a VideoMAE checkpoint.*patch_embed.*but conv1\.weight"):
        zoo.load_any(save({"conv1.weight": torch.zeros(2, 2)}, path))


def test_missing_unexpected_and_misshapen_weights_are_named_the_first_five(pretrained, tmp_path: Path) -> None:
    state, path = pretrained
    state["decoder.head.bias"] = torch.zeros(7)
    state["encoder.blocks.0.gamma_1"] = torch.zeros(48)
    missing = sorted(name for name in state if "encoder.blocks.1.m" in name or "encoder.blocks.1.n" in name)
    with pytest.raises(zoo.WeightsError) as raised:
        zoo.load_any(save({n: t for n, t in state.items() if n not in missing}, path), TINY)
    text = str(raised.value)
    assert f"{path} is a VideoMAE checkpoint" in text
    assert f"8 missing: {', '.join(missing[:5])}, …" in text and missing[5] not in text
    assert "1 not expected: encoder.blocks.0.gamma_1" in text
    assert "1 of the wrong shape: decoder.head.bias (7 instead of 384)" in text


def test_a_width_of_no_published_size_asks_for_the_architecture(pretrained) -> None:
    with pytest.raises(zoo.WeightsError, match=r"encoder is 48 wide.*give the architecture"):
        zoo.load_any(pretrained[1])


def test_an_entry_that_is_no_tensor_is_named(pretrained) -> None:
    state, path = pretrained
    with pytest.raises(zoo.WeightsError, match="1 no tensors: mask_token"):
        zoo.load_any(save({**state, "mask_token": 3}, path), TINY)
