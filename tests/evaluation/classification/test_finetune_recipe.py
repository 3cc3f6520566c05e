"""Layer decay and the learning rate of fine-tuning, against timm's on a ViT of timm's and in closed form."""

import math
import re

import pytest
import torch
from timm.models import VisionTransformer
from timm.optim import param_groups_layer_decay
from training_shards import make_run

from stm.config import FineTuneOptimisation
from stm.evaluation.classification.finetune import Classifier
from stm.models.weights import zoo
from stm.training.optimizer import Schedule, build_optimizer

RUN = make_run()


def our_name(name: str) -> str | None:
    """Our name of a parameter of timm's ViT; None of what we do not train: positions are a fixed table here."""
    if name.startswith("blocks."):
        return f"encoder.{name}"
    name = re.sub(r"^patch_embed\.proj\.", "encoder.embedding.projection.", name)
    return None if name in ("pos_embed", "norm.weight", "norm.bias") else name


@pytest.mark.parametrize("decay", [0.75, 0.7, 0.9])
def test_layer_decay_is_timms_value_for_value(decay: float) -> None:
    classifier = Classifier(zoo.build(RUN).encoder, 3)
    shape = classifier.encoder.architecture
    vit = VisionTransformer(
        img_size=32,
        embed_dim=shape.width,
        depth=shape.depth,
        num_heads=shape.heads,
        num_classes=3,
        class_token=False,
        global_pool="avg",
        fc_norm=True,
    )
    groups = param_groups_layer_decay(vit, 0.05, layer_decay=decay)
    timms = {id(p): (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    optimizer = build_optimizer(classifier, FineTuneOptimisation(), layer_decay=decay, depth=shape.depth)
    ours = {
        id(p): (group["lr_scale"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]
    }
    parameters, compared = dict(classifier.named_parameters()), set()
    for name, parameter in vit.named_parameters():
        own = our_name(name)
        if own is not None:
            assert ours[id(parameters[own])] == timms[id(parameter)], name
            compared.add(own)
    assert compared == {name for name, parameter in parameters.items() if parameter.requires_grad}


@pytest.mark.parametrize(
    ("epochs", "warmup", "per_epoch", "batch"), [(50, 5, 13, 512), (3, 0, 7, 256), (10, 2.5, 9, 64), (2, 2, 5, 8)]
)
def test_the_learning_rate_of_every_step_is_warmup_and_half_a_cosine(
    epochs: int, warmup: float, per_epoch: int, batch: int
) -> None:
    settings = FineTuneOptimisation(epochs=epochs, warmup_epochs=warmup, batch_size=batch)
    classifier = Classifier(zoo.build(RUN).encoder, 3)
    optimizer = build_optimizer(classifier, settings, layer_decay=0.75, depth=4)
    schedule = Schedule(optimizer, settings, per_epoch)
    peak, end = (value * batch / 256 for value in (1e-3, 1e-6))
    total, warm = epochs * per_epoch, round(warmup * per_epoch)
    for step in range(total):
        schedule.step_update(step)
        if step < warm:
            expected = peak * step / (warm - 1)  # VideoMAE: from 0 in the first step to the peak in the last
        else:
            expected = end + (peak - end) * (1 + math.cos(math.pi * (step - warm) / (total - warm))) / 2
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(expected * group["lr_scale"], rel=1e-12)


def test_gradients_move_layers_by_their_share() -> None:
    """AdamW's first step is as long as the learning rate, whatever the gradient: it shows each layer's."""
    settings = FineTuneOptimisation(epochs=2, warmup_epochs=0, batch_size=256, weight_decay=0)
    classifier = Classifier(zoo.build(RUN).encoder, 3)
    optimizer = build_optimizer(classifier, settings, layer_decay=0.5, depth=4)
    Schedule(optimizer, settings, 5).step_update(0)
    before = {name: parameter.detach().clone() for name, parameter in classifier.named_parameters()}
    for parameter in classifier.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for name, layer in {
        "encoder.embedding.projection.bias": 0,
        "encoder.blocks.2.mlp.fc1.bias": 3,
        "head.bias": 5,
    }.items():
        moved = (before[name] - dict(classifier.named_parameters())[name]).abs()
        torch.testing.assert_close(moved, torch.full_like(moved, 1e-3 * 0.5 ** (5 - layer)), rtol=1e-4, atol=0)
