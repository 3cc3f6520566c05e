"""UMT's alignment loss: closed forms, bounds, gradients."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from stm.objectives.alignment import alignment_loss


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_the_loss_is_the_mean_of_2_minus_2_cosines_over_layers_clips_and_tokens() -> None:
    student, teacher = draw(3, 2, 5, 7), draw(3, 2, 5, 7, seed=1)
    total = 0.0
    for s, t in zip(student.view(-1, 7).numpy(), teacher.view(-1, 7).numpy(), strict=True):
        total += 2 - 2 * (s @ t) / (np.linalg.norm(s) * np.linalg.norm(t))
    assert alignment_loss(student, teacher).item() == pytest.approx(total / 30, rel=1e-12)


@pytest.mark.parametrize("degrees", [0, 30, 60, 90, 120, 180])
def test_vectors_at_an_angle_cost_2_minus_2_cosines_of_it_whatever_their_lengths(degrees: int) -> None:
    angle = math.radians(degrees)
    student = 3 * torch.tensor([math.cos(angle), math.sin(angle)]).expand(2, 3, 4, 2)
    teacher = 0.1 * torch.tensor([1.0, 0.0]).expand(2, 3, 4, 2)
    assert alignment_loss(student, teacher).item() == pytest.approx(2 - 2 * math.cos(angle), abs=1e-6)


@pytest.mark.parametrize("width", [2, 64, 768])
def test_the_loss_is_from_0_to_4(width: int) -> None:
    student = draw(2, 2, 50, width, dtype=torch.float32)
    assert 0 <= alignment_loss(student, 5 * student) < 1e-12
    assert alignment_loss(student, -5 * student).item() == pytest.approx(4, abs=1e-5)
    assert 0 < alignment_loss(student, draw(2, 2, 50, width, seed=1, dtype=torch.float32)) < 4
    assert alignment_loss(student, torch.zeros_like(student)).item() == pytest.approx(1, abs=1e-5)


def test_the_gradient_is_the_derivative_and_at_right_angles_to_the_student() -> None:
    student, teacher = draw(2, 2, 3, 5).requires_grad_(), draw(2, 2, 3, 5, seed=1)
    assert torch.autograd.gradcheck(lambda s: alignment_loss(s, teacher), (student,))
    alignment_loss(student, teacher).backward()
    assert student.grad is not None
    assert (student.grad * student).sum(dim=-1).abs().max() < 1e-12
    aligned = (2 * teacher).requires_grad_()
    alignment_loss(aligned, teacher).backward()
    assert aligned.grad is not None and aligned.grad.abs().max() < 1e-12


def test_it_is_computed_in_float32_under_autocast() -> None:
    student, teacher = draw(2, 2, 3, 64, dtype=torch.float32), draw(2, 2, 3, 64, seed=1, dtype=torch.float32)
    plain = alignment_loss(student, teacher)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(alignment_loss(student, teacher), plain)
        rounded = alignment_loss(student.bfloat16(), teacher)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, plain, rtol=1e-2, atol=0)


def test_tokens_that_do_not_pair_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"student \(6, 2, 4, 8\) and teacher \(6, 2, 5, 8\)"):
        alignment_loss(torch.zeros(6, 2, 4, 8), torch.zeros(6, 2, 5, 8))
