"""Mixup and cutmix against timm's `Mixup`, value for value; the soft-target loss against timm's."""

from itertools import islice
from typing import Any

import numpy as np
import pytest
import timm.data.mixup
import torch
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch.nn import functional

from stm.config import FineTuneAugmentation
from stm.evaluation.classification.mixup import Draw, Mixing, mix, soft_targets
from stm.tubelets import to_unit

CLASSES, SMOOTHING = 7, 0.1


def make_mixing(seed: int = 3, **changes: Any) -> Mixing:
    return Mixing(FineTuneAugmentation.model_validate(changes), seed)


def make_batch(clips: int, size: int = 20, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    video = torch.randint(0, 256, (clips, 4, 3, size, size), dtype=torch.uint8, generator=generator)
    return {"video": video, "label": torch.randint(0, CLASSES, (clips,), generator=generator)}


def mix_batch(mixing: Mixing, batch: dict[str, Any], number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels and targets of a batch, mixed as the training does."""
    mixed = next(mixing.mixed(lambda step: iter([batch]), 1)(number))
    targets = soft_targets(batch["label"], CLASSES, SMOOTHING)
    return mix(to_unit(batch["video"]), mixed["pixel_weights"]), mix(targets, mixed["label_weights"])


def mix_as_timm(
    mixing: Mixing, batch: dict[str, Any], number: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[torch.Tensor, torch.Tensor]:
    """What timm makes of the clips as pictures [B, T * 3, S, S], with numpy's generator seeded alike."""
    settings = mixing.settings
    timms = timm.data.mixup.Mixup(
        mixup_alpha=settings.mixup,
        cutmix_alpha=settings.cutmix,
        prob=settings.mix_probability,
        switch_prob=settings.mix_switch,
        mode="batch",
        label_smoothing=SMOOTHING,
        num_classes=CLASSES,
    )
    with monkeypatch.context() as patch:
        patch.setattr(timm.data.mixup.np, "random", np.random.RandomState([mixing.seed, number]))
        video, targets = timms(to_unit(batch["video"]).flatten(1, 2), batch["label"])
    return video.unflatten(1, batch["video"].shape[1:3]), targets


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mixup": 0.0},
        {"cutmix": 0.0},
        {"mixup": 0.2, "cutmix": 0.3, "mix_probability": 0.6, "mix_switch": 0.3},
        {"cutmix": 0.05, "mixup": 0.0},  # shares near 0 and 1: whole pictures, and boxes of nothing
    ],
)
def test_mixing_is_timms_value_for_value(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    mixing, kinds = make_mixing(**changes), set()
    for number in range(40):
        batch = make_batch(6, seed=number)
        expected = mix_as_timm(mixing, batch, number, monkeypatch)
        for found, timms in zip(mix_batch(mixing, batch, number), expected, strict=True):
            assert torch.equal(found, timms)
        draw = mixing.draw(number, 20)
        kinds.add("none" if draw.share == 1 else "mixup" if draw.box is None else "cutmix")
    assert {"mixup"} & kinds == ({"mixup"} if mixing.settings.mixup else set())
    assert {"cutmix"} & kinds == ({"cutmix"} if mixing.settings.cutmix else set())
    assert mixing.settings.mix_probability == 1 or "none" in kinds


def test_pictures_that_are_not_even_sized_are_cut_as_timm_cuts_them(monkeypatch: pytest.MonkeyPatch) -> None:
    mixing = make_mixing(mixup=0.0)
    for number in range(20):
        batch = make_batch(4, size=17, seed=number)
        found, expected = mix_batch(mixing, batch, number), mix_as_timm(mixing, batch, number, monkeypatch)
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize("changes", [{"cutmix": 0.0}, {"mixup": 0.0}])
def test_of_an_odd_batch_the_middle_stays_as_it_is(changes: dict[str, Any]) -> None:
    """timm refuses odd batches; mixing each clip with its partner needs no such thing."""
    batch = make_batch(5)
    found, targets = mix_batch(make_mixing(**changes), batch, 1)
    pixels, labels = to_unit(batch["video"]), soft_targets(batch["label"], CLASSES, SMOOTHING)
    torch.testing.assert_close(found[2], pixels[2])
    torch.testing.assert_close(targets[2], labels[2])
    # Each pair changes places: what one lost the other has.
    torch.testing.assert_close(found + found.flip(0), pixels + pixels.flip(0))
    assert not torch.equal(found[0], pixels[0])


def test_a_draw_depends_on_seed_and_number_alone() -> None:
    state = np.random.get_state()[1].tolist()  # noqa: NPY002
    draws = [make_mixing().draw(number, 224) for number in range(50)]
    assert draws == [make_mixing().draw(number, 224) for number in range(50)]
    assert len(set(draws)) == 50
    assert draws != [make_mixing(seed=4).draw(number, 224) for number in range(50)]
    assert np.random.get_state()[1].tolist() == state  # noqa: NPY002


def test_the_stream_numbers_forward_passes_from_any_step() -> None:
    mixing = make_mixing()

    def batches(step: int) -> Any:  # two a step
        return iter([make_batch(4, seed=number) for number in range(2 * step, 12)])

    whole = list(mixing.mixed(batches, 2)(0))
    for step in (1, 4):
        for ours, expected in zip(mixing.mixed(batches, 2)(step), islice(whole, 2 * step, None), strict=True):
            for name in ("video", "pixel_weights", "label_weights"):
                assert torch.equal(ours[name], expected[name])


def test_without_alphas_or_probability_nothing_is_mixed() -> None:
    assert make_mixing().settings.mixes
    assert not make_mixing(mixup=0.0, cutmix=0.0).settings.mixes
    assert not make_mixing(mix_probability=0.0).settings.mixes
    assert Draw().weights(3).tolist() == [[[1.0] * 3] * 3, [[0.0] * 3] * 3]


def test_the_loss_of_soft_targets_is_timms() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(9, CLASSES, generator=generator)
    label = torch.randint(0, CLASSES, (9,), generator=generator)
    targets = mix(soft_targets(label, CLASSES, SMOOTHING), torch.tensor([0.3, 0.7]))
    torch.testing.assert_close(functional.cross_entropy(logits, targets), SoftTargetCrossEntropy()(logits, targets))
    # Unmixed soft targets are label smoothing.
    smoothed = functional.cross_entropy(logits, soft_targets(label, CLASSES, SMOOTHING))
    torch.testing.assert_close(smoothed, LabelSmoothingCrossEntropy(SMOOTHING)(logits, label))
