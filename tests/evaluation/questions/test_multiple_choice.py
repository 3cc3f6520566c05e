"""Scores of multiple choice against the formula, and the accuracy of guesses and ties."""

import math

import numpy as np
import pytest
import torch

from stm.evaluation.metrics import wilson_interval
from stm.evaluation.questions.multiple_choice import choice_scores, multiple_choice_metrics


def test_scores_are_seven_tenths_of_the_match_probability_and_three_of_the_contrast_s() -> None:
    """UMT's retrieval_mc.py: the contrast's part is a softmax over the options of cosine / temperature."""
    generator = torch.Generator().manual_seed(0)
    similarity, match = torch.rand(4, 5, generator=generator), torch.randn(4, 5, 2, generator=generator)
    for weights in ((0.7, 0.3), (1.0, 0.0), (0.0, 1.0)):
        for temperature in (0.07, torch.tensor(0.5)):
            given = () if weights == (0.7, 0.3) else weights
            found = choice_scores(similarity, match, temperature, *given)
            for row in range(4):
                powers = [math.exp(value / float(temperature)) for value in similarity[row].tolist()]
                for column in range(5):
                    no, yes = (math.exp(value) for value in match[row, column].tolist())
                    expected = weights[0] * yes / (no + yes) + weights[1] * powers[column] / sum(powers)
                    assert found[row, column].item() == pytest.approx(expected, abs=1e-6)


def test_the_temperature_decides_between_match_and_contrast() -> None:
    """Cosines of 0.30 and 0.20 outweigh a match of 0.4 against 0.6 at temperature 0.03, and do not as plain cosines."""
    match = torch.tensor([[0.4, 0.6]]).logit()
    logits = torch.stack([torch.zeros_like(match), match], dim=-1)
    similarity = torch.tensor([[0.3, 0.2]])
    assert choice_scores(similarity, logits, 0.03).argmax().item() == 0
    assert choice_scores(similarity, logits, 1.0).argmax().item() == 1


def test_half_precision_is_scored_in_float32() -> None:
    found = choice_scores(torch.zeros(1, 2, dtype=torch.bfloat16), torch.randn(1, 2, 2).bfloat16(), 0.07)
    assert found.dtype == torch.float32


def test_accuracy_of_a_small_case() -> None:
    scores = torch.tensor([[0.1, 0.9, 0.0], [0.8, 0.1, 0.2], [0.2, 0.3, 0.1], [0.0, 0.0, 0.4]])
    found = multiple_choice_metrics(scores, np.array([1, 0, 0, 2]))
    assert found == {
        "accuracy": 0.75,
        "confidence95": list(wilson_interval(3, 4)),
        "questions": 4,
        "chance": pytest.approx(1 / 3),
    }


@pytest.mark.parametrize("place", [0, 4])
def test_a_constant_score_is_at_chance_wherever_the_right_text_stands(place: int) -> None:
    assert multiple_choice_metrics(torch.zeros(20, 5), np.full(20, place))["accuracy"] == pytest.approx(0.2)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must be \[B, A\]"):
        choice_scores(torch.zeros(2, 5), torch.zeros(2, 5), 0.07)
    with pytest.raises(ValueError, match="numbers from 0 to 4"):
        multiple_choice_metrics(torch.zeros(2, 5), np.array([0, 5]))
    with pytest.raises(ValueError, match="not all finite"):
        multiple_choice_metrics(torch.tensor([[0.0, float("nan")]]), np.array([0]))
