"""ClusterSTM's masked relevance: loops, closed forms, gradients."""

import numpy as np
import pytest
import torch
from torch import Tensor

from stm.objectives.relevance import Scale, relevance, relevance_loss


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def test_relevance_is_the_cosine_with_the_own_text_or_with_each_text() -> None:
    tokens, text = draw(3, 4, 6), draw(3, 6, seed=1)
    own, everything = relevance(tokens, text), relevance(tokens, text, all_texts=True)
    assert own.shape == (3, 4) and everything.shape == (3, 4, 3)
    for clip in range(3):
        for token in range(4):
            a = tokens[clip, token].numpy()
            assert own[clip, token].item() == pytest.approx(cosine(a, text[clip].numpy()), abs=1e-14)
            for other in range(3):
                assert everything[clip, token, other].item() == pytest.approx(cosine(a, text[other].numpy()), abs=1e-14)


@pytest.mark.parametrize("all_texts", [False, True])
def test_the_loss_is_the_mean_squared_difference_of_the_cosines(all_texts: bool) -> None:
    student, teacher, text = draw(3, 4, 6), draw(3, 4, 6, seed=1), draw(3, 6, seed=2)
    total, count = 0.0, 0
    for clip in range(3):
        for token in range(4):
            for other in range(3) if all_texts else [clip]:
                there = text[other].numpy()
                total += (
                    cosine(student[clip, token].numpy(), there) - cosine(teacher[clip, token].numpy(), there)
                ) ** 2
                count += 1
    target = relevance(teacher, text, all_texts)
    assert relevance_loss(student, target, text, all_texts).item() == pytest.approx(total / count, rel=1e-12)


@pytest.mark.parametrize("all_texts", [False, True])
def test_lengths_do_not_matter_and_what_is_right_costs_nothing(all_texts: bool) -> None:
    teacher, text = draw(2, 5, 8), draw(2, 8, seed=1)
    target = relevance(teacher, text, all_texts)
    assert relevance_loss(7 * teacher, target, 0.1 * text, all_texts).item() == pytest.approx(0, abs=1e-28)


def test_the_contrary_of_the_text_costs_4_and_a_token_at_right_angles_1() -> None:
    text = torch.eye(4)[:2]
    towards = text[:, None].expand(2, 3, 4)
    target = relevance(towards, text)
    assert torch.equal(target, torch.ones(2, 3))
    assert relevance_loss(-towards, target, text) == 4
    assert relevance_loss(torch.eye(4)[3].expand(2, 3, 4), target, text) == 1


def test_with_the_own_text_alone_only_the_part_along_it_matters() -> None:
    """Turned about the text, a token is as relevant as before; to the batch's other texts it is not."""
    text = torch.eye(3, dtype=torch.float64)
    teacher = (text + 0.5 * text.roll(1, dims=0))[:, None]
    turned = (text + 0.5 * text.roll(2, dims=0))[:, None]
    assert relevance_loss(turned, relevance(teacher, text), text).item() == pytest.approx(0, abs=1e-28)
    assert relevance_loss(turned, relevance(teacher, text, True), text, True) > 0.1


# Of clips of 4 tokens: the first three are in frame 0, or two each, in any order.
FRAMES = torch.tensor([[0, 0, 0, 1], [0, 1, 0, 1], [1, 1, 0, 0]])
MEMBERS = torch.stack([FRAMES == 0, FRAMES == 1], dim=-1).double()
SCALES = {
    "cosine": Scale(),
    "logit_scale": Scale("logit_scale", 20.0),
    "frame": Scale("frame", frames=MEMBERS),
    "texts": Scale("texts"),
}


def standard(value: float, among: list[float]) -> float:
    """How many deviations from the mean; the floor keeps it finite where all are equal."""
    return (value - float(np.mean(among))) / (float(np.var(among)) + 1e-6) ** 0.5


@pytest.mark.parametrize("all_texts", [False, True])
@pytest.mark.parametrize("name", ["logit_scale", "frame", "texts"])
def test_scaled_relevance_equals_loops_over_tokens_and_texts(name: str, all_texts: bool) -> None:
    tokens, text = draw(3, 4, 6), draw(3, 6, seed=1)
    cosines = [[[cosine(t.numpy(), other.numpy()) for other in text] for t in clip] for clip in tokens]
    found = relevance(tokens, text, all_texts, SCALES[name])
    for clip in range(3):
        for token in range(4):
            for other in range(3) if all_texts else [clip]:
                value = cosines[clip][token][other]
                same = [cosines[clip][t][other] for t in range(4) if FRAMES[clip, t] == FRAMES[clip, token]]
                expected = {
                    "logit_scale": 20 * value,
                    "frame": standard(value, same),
                    "texts": standard(value, cosines[clip][token]),
                }[name]
                mine = found[clip, token, other] if all_texts else found[clip, token]
                assert mine.item() == pytest.approx(expected, abs=1e-9)


def test_what_a_constant_reaches_differs_by_scaling() -> None:
    """One value per clip can reach a raw cosine that varies little; at deviation 1 in each frame it costs 1."""
    text = draw(2, 16, seed=1)
    teacher = text[:, None] + 0.3 * draw(2, 16, 16, seed=2)
    members = torch.eye(2).repeat_interleave(8, dim=0).expand(2, -1, -1)
    raw = relevance(teacher, text)
    frame = relevance(teacher, text, scale=Scale("frame", frames=members))
    assert raw.var(dim=1, correction=0).max() < 1e-3
    torch.testing.assert_close(frame.square().mean(), torch.tensor(1.0, dtype=torch.float64), atol=0.05, rtol=0)


def test_clips_without_a_text_are_left_out_of_the_statistics_over_texts() -> None:
    tokens, text = draw(3, 4, 6), draw(3, 6, seed=1)
    missing = torch.cat([text[:2], torch.zeros(1, 6, dtype=torch.float64)])
    among = relevance(tokens, missing, True, SCALES["texts"])
    assert torch.equal(among[..., 2], torch.zeros(3, 4, dtype=torch.float64))
    torch.testing.assert_close(among[:2, :, :2], relevance(tokens[:2], text[:2], True, SCALES["texts"]))


@pytest.mark.parametrize("name", ["frame", "texts"])
def test_equal_cosines_have_relevance_0(name: str) -> None:
    text = draw(1, 6, seed=1).expand(3, 6)
    found = relevance(text[:, None].expand(3, 4, 6), text, True, SCALES[name])
    torch.testing.assert_close(found, torch.zeros_like(found))


def test_the_scaling_by_frame_needs_the_frames() -> None:
    with pytest.raises(ValueError, match="needs the frame of each token"):
        relevance(draw(3, 4, 6), draw(3, 6), scale=Scale("frame"))


@pytest.mark.parametrize("all_texts", [False, True])
@pytest.mark.parametrize("name", SCALES)
def test_the_gradient_is_the_derivative(name: str, all_texts: bool) -> None:
    text, scale = draw(3, 5, seed=1), SCALES[name]
    target = relevance(draw(3, 4, 5, seed=2), text, all_texts, scale)
    student = draw(3, 4, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: relevance_loss(s, target, text, all_texts, scale), (student,))


def test_a_clip_without_a_text_has_no_gradient() -> None:
    text = draw(2, 5, seed=1)
    text[1] = 0
    student = draw(2, 4, 5).requires_grad_()
    relevance_loss(student, relevance(draw(2, 4, 5, seed=2), text), text).backward()
    assert student.grad is not None
    assert (student.grad[0] != 0).all() and (student.grad[1] == 0).all()


def test_it_is_computed_in_float32_under_autocast() -> None:
    student, text = draw(2, 3, 64, dtype=torch.float32), draw(2, 64, seed=1, dtype=torch.float32)
    target = relevance(draw(2, 3, 64, seed=2, dtype=torch.float32), text)
    plain = relevance_loss(student, target, text)
    with torch.autocast("cpu", torch.bfloat16):
        everything = relevance(student, text, all_texts=True)
        assert torch.equal(relevance_loss(student, target, text), plain)
        assert relevance_loss(student.bfloat16(), target, text).dtype == torch.float32
    assert torch.equal(everything, relevance(student, text, all_texts=True))


def test_shapes_that_do_not_fit_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"tokens \(2, 3, 4\) and text \(2, 5\)"):
        relevance(torch.zeros(2, 3, 4), torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"relevance \(2, 3\) and target \(2, 3, 2\)"):
        relevance_loss(torch.zeros(2, 3, 4), torch.zeros(2, 3, 2), torch.zeros(2, 4))
