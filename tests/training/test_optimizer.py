"""Parameter groups, layer decay and the schedule, against closed forms and timm."""

import math

import pytest
import torch
from timm.models.vision_transformer import Block
from timm.optim import param_groups_layer_decay
from torch import nn

from stm.config import Optimisation
from stm.training.optimizer import (
    build_optimizer,
    build_schedule,
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
    assert values == pytest.approx((8e-6, 1.2e-3, 8e-5))  # VideoMAE's 1.5e-4 is 1.2e-3 for its 2048 clips


def closed_form(step: int, warmup: int, total: int, start: float, peak: float, end: float) -> float:
    if step < warmup:
        return start + (peak - start) * step / warmup
    return end + (peak - end) * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2


def test_schedule_is_warmup_then_cosine_and_needs_no_history() -> None:
    choice, per_epoch = settings(), 7
    optimizer = build_optimizer(Encoder(), choice, layer_decay=0.5, depth=DEPTH)
    schedule = build_schedule(optimizer, choice, per_epoch)
    start, peak, end = scale_learning_rate(choice)
    for step in [0, 69, 14, 3, 13, 40]:  # in any order
        schedule.step_update(step)
        expected = closed_form(step, 14, 70, start, peak, end)
        assert current_learning_rate(optimizer) == pytest.approx(expected)
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(expected * group["lr_scale"])


def test_no_epochs_need_no_schedule() -> None:
    choice = settings(epochs=0, warmup_epochs=40)
    build_schedule(build_optimizer(Encoder(), choice), choice, 4)


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
