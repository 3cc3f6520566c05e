"""The prediction head, and the file that carries it beside the model. Several processes: tests/methods/test_joined.py."""

from pathlib import Path

import pytest
import torch
from torch import nn

from stm.config import PretrainRun
from stm.models.head import GlobalBatchNorm, PredictionHead
from stm.models.weights import zoo


def test_the_head_is_linear_norm_relu_and_a_last_linear() -> None:
    torch.manual_seed(0)
    head = PredictionHead(5, 8, 3, 3).double()
    x = torch.randn(6, 5, dtype=torch.float64)
    layers = list(head)
    first, second, last = layers[0], layers[3], layers[6]
    hidden = x
    for linear in (first, second):
        hidden = hidden @ linear.weight.T
        hidden = (hidden - hidden.mean(0)) / (hidden.var(0, unbiased=False) + 1e-5).sqrt()
        hidden = hidden.relu()
    torch.testing.assert_close(head(x), hidden @ last.weight.T + last.bias, rtol=1e-10, atol=1e-12)
    assert first.bias is None and [type(m) for m in layers[:3]] == [nn.Linear, GlobalBatchNorm, nn.ReLU]


def test_one_layer_is_a_plain_projection() -> None:
    assert [type(m) for m in PredictionHead(5, 8, 3, 1)] == [nn.Linear]


def test_statistics_are_float32_under_autocast() -> None:
    norm, rows = GlobalBatchNorm(4), 100 + torch.randn(32, 4)
    with torch.autocast("cpu", torch.bfloat16):
        out = norm(rows.bfloat16())
    assert out.dtype == torch.float32
    torch.testing.assert_close(norm.running_mean, 0.1 * rows.bfloat16().float().mean(0))


def test_a_file_carries_a_module_beside_the_model_and_readers_of_the_model_do_not_see_it(tmp_path: Path) -> None:
    model = zoo.build(PretrainRun(model="tiny", image_size=32, frames=4))
    head = PredictionHead(128, 16, 7, 2)
    about = {"hidden": 16, "text_width": 7}
    for name in ("a", "b"):
        path = tmp_path / f"{name}.safetensors"
        zoo.save(model, path, extra={"contrast": head.state_dict()}, header={"contrast": about})
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    state, told = zoo.load_extra(tmp_path / "a.safetensors", "contrast")
    assert told == about and state.keys() == head.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in head.state_dict().items())
    for again in (zoo.load(path), zoo.load_any(path)):
        assert again.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(zoo.load_encoder(path).norm.weight, model.encoder.norm.weight)

    zoo.save(model, path)
    with pytest.raises(ValueError, match=r"b\.safetensors holds no 'contrast'"):
        zoo.load_extra(path, "contrast")
