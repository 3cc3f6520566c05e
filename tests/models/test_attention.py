"""Attention for pictures, against transformers' eager attention and a softmax by hand."""

import pytest
import torch
from model_parts import TINY, disturb, draw

from stm.models.attention import attention_from, centre_token
from stm.models.vit import Architecture, VideoMAE
from stm.models.weights import zoo


def make_model() -> VideoMAE:
    torch.manual_seed(0)
    model = VideoMAE(TINY)
    disturb(model)
    return model.eval()


def transformers_attention(model: VideoMAE, clip: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
    """The last block's weights, [B, heads, K, K]."""
    from transformers import VideoMAEConfig, VideoMAEForPreTraining

    config = VideoMAEConfig(**zoo.transformers_config(model.architecture), attn_implementation="eager")  # type: ignore[call-arg]
    peer = VideoMAEForPreTraining(config).eval()
    peer.load_state_dict(zoo.to_transformers(model))
    with torch.no_grad():
        found = peer.videomae(clip.transpose(1, 2).float(), bool_masked_pos=masked, output_attentions=True)
    return found.attentions[-1]


@pytest.mark.parametrize("all_tokens", [True, False])
def test_the_weights_are_those_of_transformers(all_tokens: bool) -> None:
    model = make_model()
    video, clip, _ = draw(TINY)
    asked = 9
    kept = torch.arange(TINY.tokens).expand(2, -1) if all_tokens else torch.tensor([[2, 3, 9, 20], [0, 7, 8, 9]])
    masked = torch.ones(2, TINY.tokens, dtype=torch.bool).scatter(1, kept, False)
    found = attention_from(model.encoder, video, asked, None if all_tokens else kept)
    weights = transformers_attention(model, clip, masked)
    expected = torch.stack([weights[i][:, kept[i] == asked].mean(dim=0)[0] for i in range(2)])
    assert found.shape == (2, TINY.tokens) and found.dtype == torch.float32
    torch.testing.assert_close(found.gather(1, kept), expected, rtol=1e-4, atol=1e-6)
    assert (found[masked] == 0).all()
    torch.testing.assert_close(found.sum(dim=1), torch.ones(2))


def test_the_weights_make_the_output_of_the_fused_attention() -> None:
    model = make_model()
    video, _, _ = draw(TINY)
    attention = model.encoder.blocks[-1].attn
    seen: dict[str, torch.Tensor] = {}
    hook = attention.register_forward_hook(lambda module, args, output: seen.update(x=args[0], y=output))
    with torch.no_grad():
        model.encoder(video)
    hook.remove()
    heads, token = TINY.heads, 5
    query, key, value = attention.qkv(seen["x"]).double().unflatten(2, (3, heads, -1)).unbind(2)
    logits = torch.einsum("bhd,bkhd->bhk", query[:, token], key) / (TINY.width // heads) ** 0.5
    weights = logits.softmax(dim=2)
    torch.testing.assert_close(
        attention_from(model.encoder, video, token), weights.mean(dim=1).float(), rtol=1e-5, atol=1e-7
    )
    joined = torch.einsum("bhk,bkhd->bhd", weights, value).flatten(1)
    torch.testing.assert_close(attention.proj(joined.float()), seen["y"][:, token], rtol=1e-4, atol=1e-5)


def test_asking_leaves_the_encoder_as_it_was() -> None:
    model = make_model()
    video, _, _ = draw(TINY)
    with torch.no_grad():
        before = model.encoder(video)
        attention_from(model.encoder, video)
        assert torch.equal(model.encoder(video), before)
    assert not model.encoder.blocks[-1].attn._forward_pre_hooks


def test_the_centre_is_in_the_middle_of_time_and_picture() -> None:
    base = Architecture(224, 16, 2, 16, 768, 12, 12, 384, 4, 6)
    assert centre_token(base) == 4 * 196 + 7 * 14 + 7


def test_a_token_that_is_not_seen_cannot_be_asked() -> None:
    model = make_model()
    video, _, _ = draw(TINY)
    kept = torch.tensor([[0, 1, 2], [0, 1, 3]])
    with pytest.raises(ValueError, match="token 2 is masked in a clip"):
        attention_from(model.encoder, video, 2, kept)
    with pytest.raises(ValueError, match=r"token 32 is out of range; there are 0 to 31"):
        attention_from(model.encoder, video, 32)
