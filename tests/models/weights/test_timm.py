"""Trained encoders as timm models."""

from pathlib import Path

import pytest
import torch
from model_parts import TINY, Head, disturb, draw
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_layer_decay

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
