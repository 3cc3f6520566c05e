"""Parameter groups, layer decay and the schedule, against closed forms and timm."""

import math

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import Block
from timm.optim import param_groups_layer_decay
from torch import nn

from stm.config import LanguageOptimisation, Optimisation
from stm.training.optimizer import (
    Schedule,
    build_optimizer,
    current_learning_rate,
    group_parameters,
    layer_of_parameter,
    scale_learning_rate,
)

DEPTH, WIDTH = 3, 8


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Linear(4, WIDTH)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.blocks = nn.ModuleList(Block(WIDTH, 2, qkv_bias=True) for _ in range(DEPTH))
        self.norm = nn.LayerNorm(WIDTH)

    def no_weight_decay(self) -> set[str]:  # for timm, which the groups are compared with
        return {"mask_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, object]:
        return {"stem": r"^embedding", "blocks": [(r"^blocks\.(\d+)", None)]}


def settings(**changes: object) -> Optimisation:
    return Optimisation.model_validate({"epochs": 10, "batch_size": 64, "warmup_epochs": 2, **changes})


def test_vectors_are_not_decayed_and_everything_is_in_one_group() -> None:
    module = Encoder()
    groups = group_parameters(module, 0.05)
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}  # type: ignore[attr-defined]
    assert decay.keys() == {id(p) for p in module.parameters()}
    assert sum(len(group["params"]) for group in groups) == len(decay)  # type: ignore[arg-type, misc]
    for name, parameter in module.named_parameters():
        plain = name.endswith("bias") or "norm" in name or name == "mask_token"
        assert decay[id(parameter)] == (0.0 if plain else 0.05), name


def test_frozen_parameters_are_left_out() -> None:
    module = Encoder()
    module.blocks.requires_grad_(False)
    taken = [p for group in group_parameters(module, 0.05) for p in group["params"]]  # type: ignore[attr-defined]
    assert len(taken) == sum(p.requires_grad for p in module.parameters()) < len(list(module.parameters()))


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("encoder.embedding.projection.weight", 0),
        ("encoder.blocks.0.attn.qkv.weight", 1),
        ("encoder.blocks.11.mlp.fc2.bias", 12),
        ("encoder.norm.weight", 13),
        ("fc_norm.weight", 13),
        ("head.weight", 13),
    ],
)
def test_layer_numbers_are_videomaes(name: str, layer: int) -> None:
    assert layer_of_parameter(name, 12) == layer


def test_layer_decay_equals_the_closed_form_and_timm() -> None:
    module, decay = Encoder(), 0.75
    optimizer = build_optimizer(module, settings(), layer_decay=decay, depth=DEPTH)
    ours = {id(p): (g["lr_scale"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    # timm counts from the deepest group it finds: embedding, three blocks, the rest.
    timms = {
        id(p): (g["lr_scale"], g["weight_decay"])
        for g in param_groups_layer_decay(
            module, 0.05, layer_decay=decay, no_weight_decay_list=module.no_weight_decay()
        )
        for p in g["params"]
    }
    for name, parameter in module.named_parameters():
        layer = int(name.split(".")[1]) + 1 if name.startswith("blocks") else 0 if "embedding" in name else DEPTH + 1
        assert ours[id(parameter)][0] == pytest.approx(decay ** (DEPTH + 1 - layer)), name
        assert ours[id(parameter)] == pytest.approx(timms[id(parameter)]), name


def test_learning_rates_scale_with_the_batch() -> None:
    values = scale_learning_rate(settings(batch_size=2048))
    assert values == pytest.approx((0, 1.2e-3, 8e-5))  # VideoMAE's 1.5e-4 is 1.2e-3 for its 2048 clips


def videomaes_schedule(warmup: int, total: int, start: float, peak: float, end: float) -> list[float]:
    """utils.cosine_scheduler: the warm-up includes both of its ends, and the cosine starts at the peak again."""
    rates = list(np.linspace(start, peak, warmup))
    rest = total - warmup
    return rates + [end + 0.5 * (peak - end) * (1 + math.cos(math.pi * step / rest)) for step in range(rest)]


def umts_schedule(warmup: int, total: int, peak: float, ratio: float) -> list[float]:
    """get_cosine_schedule_with_warmup: shares of the peak, nowhere below `ratio`."""
    rates = [max(ratio, step / max(1, warmup)) for step in range(warmup)]
    rest = [0.5 * (1 + math.cos(math.pi * step / max(1, total - warmup))) for step in range(total - warmup)]
    return [peak * rate for rate in rates + [max(ratio, rate) for rate in rest]]


@pytest.mark.parametrize("warmup", [0, 1, 2, 10])
@pytest.mark.parametrize("start", [0.0, 1e-6])
def test_the_schedule_is_videomaes_by_default(warmup: int, start: float) -> None:
    choice, per_epoch = settings(warmup_epochs=warmup, batch_size=256, warmup_learning_rate=start), 7
    optimizer = build_optimizer(Encoder(), choice, layer_decay=0.5, depth=DEPTH)
    schedule = Schedule(optimizer, choice, per_epoch)
    expected = videomaes_schedule(warmup * per_epoch, 70, start, 1.5e-4, 1e-5)
    for step in [0, 69, 14, 3, 13, 40, *range(70)]:  # in any order
        schedule.step_update(step)
        assert current_learning_rate(optimizer) == pytest.approx(expected[step], rel=1e-12, abs=0)
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(expected[step] * group["lr_scale"])


@pytest.mark.parametrize(("warmup", "peak"), [(0, 2e-5), (1, 4e-5), (2, 1e-5)])
def test_the_schedule_of_fine_tuning_on_texts_is_umts(warmup: int, peak: float) -> None:
    choice, per_epoch = LanguageOptimisation(epochs=10, warmup_epochs=warmup, learning_rate=peak), 150
    optimizer = build_optimizer(Encoder(), choice)
    schedule = Schedule(optimizer, choice, per_epoch)
    expected = umts_schedule(warmup * per_epoch, 1500, peak, 0.01)
    interpolated = videomaes_schedule(warmup * per_epoch, 1500, 0, peak, 0.01 * peak)
    found = []
    for step in range(1500):
        schedule.step_update(step)
        found.append(current_learning_rate(optimizer))
    assert found == pytest.approx(expected, rel=1e-9)
    # The floor, on which an interpolation has one step.
    assert sum(rate == pytest.approx(0.01 * peak, rel=1e-9) for rate in found) > 70
    assert max(abs(one - other) for one, other in zip(found, interpolated, strict=True)) > 0.004 * peak


def test_the_minimum_is_a_hundredth_of_the_runs_own_peak_unless_given() -> None:
    for peak in (4e-5, 1e-5, "2e-5"):
        assert LanguageOptimisation(learning_rate=peak).min_learning_rate == pytest.approx(float(peak) / 100)  # type: ignore[arg-type]
    assert LanguageOptimisation(learning_rate=1e-5, min_learning_rate=0).min_learning_rate == 0


def test_no_epochs_need_no_schedule() -> None:
    choice = settings(epochs=0, warmup_epochs=40)
    Schedule(build_optimizer(Encoder(), choice), choice, 4).step_update(0)


def test_scalars_are_decayed_and_vectors_are_not() -> None:
    """UMT's rule (utils/optimizer.py): no decay for one dimension or a name that ends in ".bias", decay for the rest."""
    module = Encoder()
    module.temperature = nn.Parameter(torch.tensor(0.07))
    module.mask_token.requires_grad_(False)  # UMT has none
    groups = group_parameters(module, 0.02)
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}  # type: ignore[attr-defined]
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            plain = len(parameter.shape) == 1 or name.endswith(".bias")
            assert decay[id(parameter)] == (0 if plain else 0.02), name
    assert decay[id(module.temperature)] == 0.02


def test_the_fused_kernel_takes_the_same_steps_as_the_plain_loop() -> None:
    torch.manual_seed(0)
    fused, plain = Encoder(), Encoder()
    plain.load_state_dict(fused.state_dict())
    optimizers = [build_optimizer(fused, settings()), build_optimizer(plain, settings())]
    assert all(group["fused"] for group in optimizers[0].param_groups)
    for group in optimizers[1].param_groups:
        group["fused"], group["foreach"] = False, False
    for step in range(5):
        generator = torch.Generator().manual_seed(step)
        for one, other in zip(fused.parameters(), plain.parameters(), strict=True):
            one.grad = torch.randn(one.shape, generator=generator)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for (name, one), other in zip(fused.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")  # type: ignore[misc]
