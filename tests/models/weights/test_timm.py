"""Trained encoders as timm models, and as folders that timm loads without stm."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from model_parts import TINY, Head, disturb, draw
from safetensors.torch import load_file, save_file
from timm.data import resolve_model_data_config
from timm.models import PretrainedCfg, save_for_hf
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_layer_decay
from transformers import AutoModelForImageClassification

from stm.models.vit import VideoEncoder, VideoMAE
from stm.models.weights import zoo
from stm.models.weights.timm import to_timm_state


@pytest.mark.parametrize("whole", [True, False])
def test_timm_s_features_are_ours(whole: bool) -> None:
    model = disturb(VideoMAE(TINY))
    peer = zoo.to_timm(model if whole else model.encoder)
    assert isinstance(peer, VisionTransformer)
    video, clip, _ = draw(TINY)
    with torch.inference_mode():
        torch.testing.assert_close(peer.forward_features(clip.float()), model.encoder(video), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(peer(clip.float()), model.encoder.forward_features(video), rtol=1e-5, atol=1e-5)
        exact = peer.double().forward_features(clip)
        torch.testing.assert_close(exact, model.double().encoder(video.double() / 255), rtol=1e-5, atol=1e-6)


def test_timm_s_logits_are_ours(tmp_path: Path) -> None:
    model = disturb(Head(VideoEncoder(TINY), 5))
    zoo.save(model, tmp_path / "a.safetensors")
    peer = zoo.to_timm(zoo.read(tmp_path / "a.safetensors"))
    video, clip, _ = draw(TINY)
    torch.testing.assert_close(peer(clip.float()), model(video), rtol=1e-5, atol=1e-5)


def test_the_state_loads_into_timm_s_model_strictly_and_again() -> None:
    model = disturb(VideoMAE(TINY))
    peer, weights = zoo.to_timm(VideoEncoder(TINY)), zoo.to_timm(model).state_dict()
    result = peer.load_state_dict(weights, strict=True)
    assert result.missing_keys == [] and result.unexpected_keys == []
    assert (
        to_timm_state(zoo.Weights(TINY, {f"encoder.{n}": t for n, t in model.encoder.state_dict().items()})).keys()
        == weights.keys()
    )


def test_timm_s_own_tools_work_on_it() -> None:
    peer = zoo.to_timm(disturb(VideoMAE(TINY)))
    _, clip, _ = draw(TINY)
    features = peer(clip.float())
    peer.set_grad_checkpointing()
    assert torch.equal(peer.train()(clip.float()), features)
    peer.reset_classifier(9)
    assert peer(clip.float()).shape == (2, 9)
    groups = param_groups_layer_decay(peer, layer_decay=0.5)
    assert len({group["lr_scale"] for group in groups}) == TINY.depth + 2
    assert not peer.pos_embed.requires_grad and peer.blocks[0].attn.qkv.weight.requires_grad


def test_a_clip_of_another_shape_is_an_error_that_says_the_right_one() -> None:
    peer = zoo.to_timm(VideoEncoder(TINY))
    video, _, _ = draw(TINY)
    with pytest.raises(ValueError, match=r"must be \[B, 3, 4, 32, 32\], not \[2, 4, 3, 32, 32\]"):
        peer(video.float())


def arrange(clip: torch.Tensor) -> torch.Tensor:
    """The image of a clip [B, 3, T, S, S]: the definition, pixel by pixel, for tubelets of two frames."""
    batch, _, frames, side, _ = clip.shape
    image = torch.empty(batch, 6, frames // 2 * side, side)
    for time in range(frames):
        slot, frame = divmod(time, 2)
        for color in range(3):
            image[:, 2 * color + frame, slot * side : (slot + 1) * side] = clip[:, color, time]
    return image


def test_intermediate_features_are_those_of_each_block() -> None:
    model = disturb(VideoMAE(TINY))
    peer = zoo.to_timm(model)
    video, clip, _ = draw(TINY)
    expected = model.encoder.forward_layers(video, None, TINY.depth)
    final, maps = peer.forward_intermediates(clip.float(), norm=True)
    torch.testing.assert_close(final, expected[-1], rtol=1e-5, atol=1e-5)
    assert [m.shape for m in maps] == [(2, TINY.width, 2, 4, 4)] * TINY.depth  # slots, rows, columns
    for layer, block in zip(maps, expected, strict=True):
        torch.testing.assert_close(layer.flatten(2).transpose(1, 2), block, rtol=1e-5, atol=1e-5)
    (tokens,) = peer.forward_intermediates(clip.float(), 1, norm=True, intermediates_only=True, output_fmt="NLC")
    torch.testing.assert_close(tokens, expected[-1], rtol=1e-5, atol=1e-5)
    (last,) = peer.get_intermediate_layers(clip.float(), reshape=True)
    assert last.shape == (2, TINY.width, 2, 4, 4)
    named = peer.forward_intermediates(clip.float(), 1, output_dict=True)
    assert named["image_features"].shape == (2, 32, TINY.width) and named["image_intermediates"][0].dim() == 5


@pytest.mark.parametrize("positions", ["joint", "separable"])
def test_timm_loads_a_folder_alone_and_computes_the_same(tmp_path: Path, positions: str) -> None:
    model = disturb(VideoMAE(replace(TINY, positions=positions)))
    zoo.save(model, tmp_path / "a.safetensors")
    folder = zoo.convert(tmp_path / "a.safetensors", tmp_path / "peer", "timm", license="mit")
    peer = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert type(peer) is VisionTransformer
    video, clip, _ = draw(TINY)
    image = arrange(clip.float())
    torch.testing.assert_close(peer.forward_features(image), model.encoder(video), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(peer(image), model.encoder.forward_features(video), rtol=1e-5, atol=1e-5)
    settings = resolve_model_data_config(peer)
    assert settings["input_size"] == (6, 64, 32) and settings["crop_pct"] == 1.0
    assert settings["mean"] == [0.485, 0.485, 0.456, 0.456, 0.406, 0.406]
    assert peer.pretrained_cfg["license"] == "mit"
    back = zoo.load_encoder(folder)
    assert back.architecture == model.architecture
    assert all(torch.equal(tensor, back.state_dict()[name]) for name, tensor in model.encoder.state_dict().items())


def test_a_classifier_s_folder_has_its_labels_and_can_be_tuned_for_others(tmp_path: Path) -> None:
    model = disturb(Head(VideoEncoder(TINY), 3))
    zoo.save(model, tmp_path / "a.safetensors", labels=["run", "jump", "sit"])
    folder = zoo.convert(tmp_path / "a.safetensors", tmp_path / "peer", "timm")
    peer = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    video, clip, _ = draw(TINY)
    torch.testing.assert_close(peer(arrange(clip.float())), model(video), rtol=1e-5, atol=1e-5)
    assert peer.pretrained_cfg["label_names"] == ["run", "jump", "sit"]
    again = zoo.load_classifier(folder)
    assert again.labels == ("run", "jump", "sit")
    torch.testing.assert_close(again.eval()(video), model(video), rtol=1e-6, atol=1e-6)
    wrapped = AutoModelForImageClassification.from_pretrained(folder).eval()  # transformers' wrapper of timm
    torch.testing.assert_close(wrapped(arrange(clip.float())).logits, model(video), rtol=1e-5, atol=1e-5)
    other = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=7, drop_path_rate=0.1)
    assert other(arrange(clip.float())).shape == (2, 7)
    assert torch.equal(*(m.get_parameter("blocks.1.mlp.fc2.weight") for m in (other, model.encoder)))


def test_the_folder_s_config_is_what_timm_itself_would_write(tmp_path: Path) -> None:
    model = disturb(Head(VideoEncoder(TINY), 3))
    zoo.save(model, tmp_path / "a.safetensors", labels=["run", "jump", "sit"])
    folder = zoo.convert(tmp_path / "a.safetensors", tmp_path / "peer", "timm")
    ours = json.loads((folder / "config.json").read_text())
    for number, peer in enumerate(
        [timm.create_model(f"local-dir:{folder}", pretrained=True), zoo.to_timm(zoo.read(folder))]
    ):
        save_for_hf(peer, str(tmp_path / f"{number}"), safe_serialization=True)
        theirs = json.loads((tmp_path / f"{number}/config.json").read_text())
        cfg = theirs.pop("pretrained_cfg")
        assert theirs["model_args"].pop("num_classes") == theirs["num_classes"]  # named twice
        assert theirs == {key: ours[key] for key in theirs}
        assert cfg.pop("custom_load") is False
        assert cfg == {key: value for key, value in ours["pretrained_cfg"].items() if key in cfg}
        saved = timm.create_model(f"local-dir:{tmp_path / str(number)}", pretrained=True).state_dict()
        assert all(torch.equal(tensor, saved[name]) for name, tensor in zoo.to_timm(model).state_dict().items())
    PretrainedCfg(**ours["pretrained_cfg"])  # refuses keys that timm does not know


def test_another_epsilon_is_said_and_changes_little(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = disturb(VideoEncoder(replace(TINY, norm_eps=1e-12)))
    zoo.save(model, tmp_path / "a.safetensors")
    folder = zoo.convert(tmp_path / "a.safetensors", tmp_path / "peer", "timm")
    assert "epsilon of 1e-06 in timm instead of 1e-12" in capsys.readouterr().err
    video, clip, _ = draw(TINY)
    found = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(arrange(clip.float()))
    torch.testing.assert_close(found, model.forward_features(video), rtol=1e-4, atol=1e-4)


def test_timm_folders_that_are_not_ours_or_were_changed_are_errors(tmp_path: Path) -> None:
    zoo.save(VideoEncoder(TINY), tmp_path / "a.safetensors")
    folder = zoo.convert(tmp_path / "a.safetensors", tmp_path / "peer", "timm")
    state = load_file(folder / "model.safetensors")
    save_file(state | {"pos_embed": state["pos_embed"] + 1}, folder / "model.safetensors")
    with pytest.raises(zoo.WeightsError, match="its position embeddings were trained"):
        zoo.read(folder)
    (folder / "model.safetensors").write_bytes(b"{")
    with pytest.raises(zoo.WeightsError, match=r"model\.safetensors: cannot be read"):
        zoo.read(folder)
    config = json.loads((folder / "config.json").read_text())
    del config["stm"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(zoo.WeightsError, match="not one that stm wrote"):
        zoo.read(folder)
