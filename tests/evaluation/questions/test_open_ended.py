"""Counted answers and exact-match accuracy against small cases worked by hand."""

import pytest
import torch

from stm.evaluation.metrics import normalise, wilson_interval
from stm.evaluation.questions.open_ended import (
    choose_answer,
    count_answers,
    open_ended_metrics,
)


def test_answers_are_counted_in_order_of_frequency_and_then_of_the_alphabet() -> None:
    given = ["Man", "dog", "man ", "two  dogs", "cat", "cat", "dog", "cat", "  "]
    assert list(count_answers(given).items()) == [("cat", 3), ("dog", 2), ("man", 2), ("two dogs", 1)]
    assert count_answers([]) == {}


def test_the_answer_of_highest_score_is_chosen_and_of_equal_ones_the_first() -> None:
    infinity = float("inf")
    scores = torch.tensor([[-3.0, -1.0, -2.0], [-infinity, -5.0, -5.0], [-0.5, -infinity, -0.5]])
    assert choose_answer(scores, ["a", "b", "c"]) == [1, 1, 0]
    # A long row, as a sort that is not stable keeps the order of short ones.
    assert choose_answer(torch.zeros(2, 1000), [str(number) for number in range(1000)]) == [0, 0]


def test_scores_without_a_choice_are_refused() -> None:
    with pytest.raises(ValueError, match="one column per answer"):
        choose_answer(torch.zeros(2, 3), ["a", "b"])
    infinity = float("inf")
    for last in ([-infinity, -infinity], [0.0, float("nan")], [0.0, infinity]):
        with pytest.raises(ValueError, match="no answer with a finite score"):
            choose_answer(torch.tensor([[0.0, 1.0], last]), ["a", "b"])


def test_accuracy_counts_questions_whose_own_answer_was_given() -> None:
    predicted = ["Dog", "cat", "two  dogs", "red", "a man"]
    right = ["dog", "dog", "two dogs", "blue", "man"]
    found = open_ended_metrics(predicted, right, ["dog", "cat", "two dogs", "red", "man"])
    assert found["accuracy"] == pytest.approx(2 / 5) and found["questions"] == 5
    assert found["confidence95"] == list(wilson_interval(2, 5))
    assert found["reachable"] == pytest.approx(4 / 5)  # blue is not among the answers
    assert normalise("  Two\tDogs ") == "two dogs"


def test_an_empty_prediction_is_never_right_and_a_question_without_answer_is_refused() -> None:
    assert open_ended_metrics([""], ["dog"], ["dog"])["accuracy"] == 0
    with pytest.raises(ValueError, match="1 questions have no answer"):
        open_ended_metrics(["a", "b"], ["a", " "], ["a"])
    with pytest.raises(ValueError, match="1 predictions for 2 questions"):
        open_ended_metrics(["a"], ["a", "b"], ["a"])
