"""The text objectives train STM's mask through the tokens that the text meets: gradients against the chain rule by hand."""

from typing import Any

import pytest
import torch
from language_runs import make_batch, make_run, make_small_bert
from torch import Tensor

from stm.methods import build_method
from stm.methods.video_language import VideoLanguage

OBJECTIVES = ("alignment", "contrastive", "matching", "masked_language")
TEMPERATURE = 0.5  # high, so that the softmax's gradient does not vanish in float32


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> str:
    return make_small_bert(tmp_path_factory.mktemp("bert"))


def build(bert: str, objective: str, **settings: Any) -> VideoLanguage:
    torch.manual_seed(0)
    weights = {name: float(name == objective) for name in OBJECTIVES}
    changes = {"objectives": weights, "spatio_temporal": {"temperature": TEMPERATURE, "width": 16, **settings}}
    method = build_method(make_run("stm", bert, **changes), 96)
    assert isinstance(method, VideoLanguage)
    with torch.no_grad():  # points start at the centre, where the layers before the last get no gradient
        for parameter in method.branch.predictor.predictor.point.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return method.train()


def to_mask(tokens: Tensor, gradient: Tensor, hidden: Tensor, as_released: bool) -> Tensor:
    """The derivative by the mask [B, L] (1: hidden) of a loss with this gradient [B, K, W] at the hidden tokens."""
    batch, length, width = tokens.shape
    count = hidden.shape[1]
    mask = torch.zeros(batch, length).scatter(1, hidden, 1.0)
    found = torch.zeros(batch, length).scatter(1, hidden, (gradient * tokens.gather(1, wide(hidden, width))).sum(-1))
    memory = (tokens * mask[..., None]).contiguous()
    rows = memory.flatten().reshape(batch, width, length) if as_released else memory.transpose(1, 2)
    pulled = gradient.contiguous().flatten().reshape(batch, width, count) if as_released else gradient.transpose(1, 2)
    for window in range(count):
        first, end = window * length // count, -(-(window + 1) * length // count)
        place = first + rows[..., first:end].argmax(dim=-1)  # [B, W]
        flat = torch.arange(width) * length + place
        token, feature = (flat // width, flat % width) if as_released else (place, torch.arange(width).expand_as(place))
        for clip in range(batch):
            terms = pulled[clip, :, window] * tokens[clip, token[clip], feature[clip]]
            found[clip].index_add_(0, token[clip], terms)
    return found


def wide(index: Tensor, width: int) -> Tensor:
    return index[..., None].expand(-1, -1, width)


@pytest.mark.parametrize("mask_gradient", ["by_token", "as_released"])
@pytest.mark.parametrize("objective", ["contrastive", "matching", "masked_language"])
def test_each_text_objective_alone_trains_predictor_and_mix(objective: str, mask_gradient: str, bert: str) -> None:
    method = build(bert, objective, mask_gradient=mask_gradient)
    batch = make_batch()
    batch["tokens"] = method.encode_captions(batch["caption"])
    torch.manual_seed(3)  # of the negatives and of the masked words
    method(batch)["loss"].backward()

    predictor, encoder = method.branch.predictor, method.model.encoder
    output = method.teacher(batch["video"])
    _, hidden = method.branch.mask(batch, output)
    tokens = encoder.embed(batch["video"]).detach()
    chosen = tokens.gather(1, wide(hidden, tokens.shape[2])).requires_grad_()
    torch.manual_seed(3)
    losses = method.compare(encoder.encode(chosen, 1)[0], method.read(batch["tokens"]), batch["clip"])
    (gradient,) = torch.autograd.grad(losses[objective], chosen)

    by_mask = to_mask(tokens, gradient, hidden, mask_gradient == "as_released").view(4, 4, 16)
    drawn = method.branch.sample(batch, output)
    soft = (drawn.score.detach() / TEMPERATURE).softmax(-1)
    by_score = soft * (by_mask - (soft * by_mask).sum(-1, keepdim=True)) / TEMPERATURE
    # score = log(m / sum m) + noise with m = mix * blobs + (1 - mix) * attention
    mix, blobs, attention = predictor.mix.item(), drawn.blobs.detach(), output.attention
    mixture = mix * blobs + (1 - mix) * attention
    by_mixture = by_score / mixture - (by_score.sum(-1) / mixture.sum(-1))[..., None]
    torch.testing.assert_close(predictor.mix.grad, (by_mixture * (blobs - attention)).sum(), rtol=1e-3, atol=1e-6)
    assert predictor.mix.grad != 0
    parameters = [p for name, p in predictor.named_parameters() if name != "mix"]
    expected = torch.autograd.grad(drawn.blobs, parameters, mix * by_mixture)
    for parameter, value in zip(parameters, expected, strict=True):
        assert parameter.grad is not None
        assert (parameter.grad - value).norm() < 1e-3 * value.norm() + 1e-7
    assert max(value.abs().max() for value in expected) > 1e-6


def test_a_text_that_meets_all_tokens_does_not_train_the_mask(bert: str) -> None:
    method = build(bert, "contrastive", text="all")
    batch = make_batch()
    batch["tokens"] = method.encode_captions(batch["caption"])
    method(batch)["loss"].backward()
    assert all(p.grad is None or not p.grad.any() for p in method.branch.predictor.parameters())
