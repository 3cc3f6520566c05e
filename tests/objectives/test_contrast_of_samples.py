"""The contrast in which rows of one sample share the target, against loops over plain numbers, in float64."""

import math

import numpy as np
import pytest
import torch
from drawn import draw_pairs

from stm.objectives.contrast import contrast_ids, match_pairs


def contrast_by_loops(video: np.ndarray, text: np.ndarray, ids: list[int], temperature: float) -> float:
    rows, total = range(len(ids)), 0.0
    for one, other in ((video, text), (text, video)):
        for i in rows:
            scores = [math.exp(one[i] @ other[j] / temperature) for j in rows]
            same = [j for j in rows if ids[j] == ids[i]]
            total -= sum(math.log(scores[j] / sum(scores)) for j in same) / len(same)
    return total / (2 * len(ids))


@pytest.mark.parametrize("temperature", [0.07, 1.0])
@pytest.mark.parametrize("ids", [[0, 1, 2, 3, 4, 5], [7, 1, 7, 2, 1, 7], [3] * 6, [2**40, 2**40 + 1, 0, 1, 2, 2**40]])
def test_rows_of_one_sample_share_the_target(ids: list[int], temperature: float) -> None:
    video, text = draw_pairs(6)
    loss = contrast_ids(video, text, torch.tensor(ids), temperature)
    expected = contrast_by_loops(video.numpy(), text.numpy(), ids, temperature)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_without_repeated_samples_it_is_info_nce() -> None:
    found = []
    for ours in (True, False):
        video, text = (x.requires_grad_() for x in draw_pairs(9))
        temperature = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
        if ours:
            loss = contrast_ids(video, text, torch.arange(9).flip(0), temperature)
        else:
            loss = match_pairs(video, text, temperature).loss
        loss.backward()
        found.append([loss, video.grad, text.grad, temperature.grad])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_the_contrast_is_float32_under_autocast() -> None:
    video, text = (x.bfloat16() for x in draw_pairs(6))
    with torch.autocast("cpu", torch.bfloat16):
        loss = contrast_ids(video, text, torch.arange(6), 0.01)
    assert loss.dtype == torch.float32
    exact = contrast_ids(video.double(), text.double(), torch.arange(6), 0.01)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)


def test_shapes_that_do_not_fit_are_errors() -> None:
    video, text = draw_pairs(4)
    for arguments in ((video[:3], text, torch.arange(4)), (video, text, torch.arange(3)), (video[0], text[0], text)):
        with pytest.raises(ValueError, match=r"must both be \[B, E\], and ids"):
            contrast_ids(*arguments, 0.1)
