"""InfoNCE in one process: against loops in float64, open_clip, and what must not depend on what."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from stm.objectives.contrast import match_pairs


def draw(rows: int = 6, width: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    pairs = torch.randn(2, rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    video, text = normalize(pairs, dim=2)
    return video, text


def by_loops(video: np.ndarray, text: np.ndarray, temperature: float, rows: list[int]) -> float:
    total = 0.0
    for i in rows:
        right = math.exp(video[i] @ text[i] / temperature)
        total -= math.log(right / sum(math.exp(video[i] @ text[j] / temperature) for j in rows))
        total -= math.log(right / sum(math.exp(video[j] @ text[i] / temperature) for j in rows))
    return total / (2 * len(rows))


@pytest.mark.parametrize("temperature", [0.07, 1.0])
@pytest.mark.parametrize("rows", [[0, 1, 2, 3, 4, 5], [0, 3, 4], [2]])
def test_the_loss_is_the_mean_of_both_cross_entropies_over_the_pairs_that_take_part(
    temperature: float, rows: list[int]
) -> None:
    video, text = draw()
    present = torch.tensor([i in rows for i in range(6)])
    loss = match_pairs(video, text, temperature, present).loss
    assert loss.item() == pytest.approx(by_loops(video.numpy(), text.numpy(), temperature, rows), rel=1e-12, abs=1e-12)


def test_values_and_gradients_are_open_clips() -> None:
    from open_clip.loss import ClipLoss

    found = []
    for peer in (True, False):
        video, text = (x.requires_grad_() for x in draw(rows=9))
        scale = torch.tensor(14.3, dtype=torch.float64, requires_grad=True)
        loss = ClipLoss()(video, text, scale) if peer else match_pairs(video, text, 1 / scale).loss
        loss.backward()
        found.append((loss.detach(), video.grad, text.grad, scale.grad))
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_pairs_that_take_no_part_have_no_gradient_and_change_nothing() -> None:
    video, text = draw()
    present = torch.tensor([True, False, True, True, False, True])
    other = text.clone()
    other[~present] = 0  # what a clip without a caption has
    video.requires_grad_()
    loss = match_pairs(video, other, 0.01, present).loss
    loss.backward()
    assert torch.equal(loss, match_pairs(video, text, 0.01, present).loss)
    assert video.grad is not None
    assert (video.grad[~present] == 0).all() and (video.grad[present] != 0).any(dim=1).all()
    torch.testing.assert_close(loss, match_pairs(video[present], text[present], 0.01).loss, rtol=1e-12, atol=0)


def test_without_any_pair_loss_and_gradient_are_zero() -> None:
    video, text = (x.float().requires_grad_() for x in draw())
    match = match_pairs(video, text, 0.01, torch.zeros(6, dtype=torch.bool))
    match.loss.backward()
    assert match.loss == 0 and match.accuracy == 0
    assert video.grad is not None and (video.grad == 0).all()


def test_accuracy_is_the_share_of_clips_nearest_to_their_own_caption() -> None:
    video = torch.eye(4)
    text = video[[0, 1, 3, 2]]
    assert match_pairs(video, text, 0.1).accuracy == 0.5
    assert match_pairs(video, text, 0.1, torch.tensor([True, True, True, False])).accuracy == pytest.approx(2 / 3)


def test_logits_are_float32_under_autocast() -> None:
    video, text = (x.float() for x in draw(rows=32, width=64))
    plain = match_pairs(video, text, 0.01).loss
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(match_pairs(video, text, 0.01).loss, plain)
        rounded = match_pairs(video.bfloat16(), text, 0.01).loss
    assert rounded.dtype == torch.float32


def test_equal_captions_cost_a_constant_and_pull_no_clip_away() -> None:
    """Two clips with one text: at best each gets half of the probability, and there the gradient is zero."""
    shared, other = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([-1.0, 0.0, 0.0])
    text = torch.stack([shared, shared, other]).double()
    video = text.clone().requires_grad_()
    loss = match_pairs(video, text, 0.01).loss
    loss.backward()
    assert loss.item() == pytest.approx(2 / 3 * math.log(2), abs=1e-10)
    assert video.grad is not None and video.grad.abs().max() < 1e-10


def test_shapes_that_do_not_pair_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"video \(3, 4\) and text \(3, 5\)"):
        match_pairs(torch.zeros(3, 4), torch.zeros(3, 5), 0.1)
