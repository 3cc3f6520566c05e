"""Open-ended question answering: answers of the training split in order of frequency, and how many questions are right.

As in the field a question is right when the chosen answer reads as one of the accepted answers, and the answers that can
be chosen are those of a list, made of the training split's (UMT, section 1.2: question answering).
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from stm.evaluation.metrics import wilson_interval


def answer_list(answers: Iterable[Sequence[str]], most: int | None = None) -> dict[str, int]:
    """The answers of a split, how often each was given, the most frequent first; equals in order of the alphabet.

    Args:
        answers: of each question the answers that were given, repeated ones included.
        most: keep so many of the most frequent; None: all.
    """
    counts = Counter(normalise(answer) for given in answers for answer in given)
    counts.pop("", None)
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:most])


def weigh_answers(given: Sequence[str]) -> dict[str, float]:
    """The answers of one question to train on and the weight of each: its share of those that were given (UMT).

    The weights add up to 1, so that each question counts alike. Empty answers are left out.
    """
    counts = answer_list([given])
    total = sum(counts.values())
    return {answer: count / total for answer, count in counts.items()}


def choose_answer(scores: Tensor, answers: Sequence[str]) -> list[str]:
    """The answer of highest score for each question; of equal ones the first, which is the more frequent.

    Args:
        scores: float [B, A], as of `TextDecoder.rank`; minus infinity for an answer that was not ranked.
        answers: A of them, in the order of the columns.

    Raises:
        ValueError: there are not as many answers as columns, or a row has no score or one that is no number.
    """
    if scores.dim() != 2 or scores.shape[1] != len(answers):
        raise ValueError(f"scores {tuple(scores.shape)} must be [B, {len(answers)}], one column an answer")
    ordered, numbers = scores.sort(dim=1, descending=True, stable=True)  # a NaN comes first
    if not bool(ordered[:, :1].isfinite().all()):
        raise ValueError("a question has no answer with a finite score: were the weights trained to the end?")
    return [answers[number] for number in numbers[:, 0].tolist()]


def normalise(answer: str) -> str:
    """An answer as it is compared: lower case, single spaces."""
    return " ".join(answer.lower().split())


def answering_figures(
    predicted: Sequence[str], accepted: Sequence[Sequence[str]], answers: Iterable[str]
) -> dict[str, Any]:
    """Exact-match accuracy.

    Args:
        predicted: the chosen answer of each question.
        accepted: of each question the answers that are right, one or more.
        answers: all answers that could be chosen.

    Returns:
        `accuracy`, `confidence95` (Wilson's), `questions`, and `reachable`: the share of questions that have an accepted
        answer among `answers`, which no model that chooses from them can exceed.

    Raises:
        ValueError: not one prediction a question, or a question without an accepted answer.
    """
    if len(predicted) != len(accepted):
        raise ValueError(f"{len(predicted)} predictions for {len(accepted)} questions")
    right = [{normalise(answer) for answer in own} - {""} for own in accepted]
    if unanswered := sum(not own for own in right):
        raise ValueError(f"{unanswered} questions have no accepted answer: leave them out")
    known = {normalise(answer) for answer in answers}
    hits = sum(normalise(answer) in own for answer, own in zip(predicted, right, strict=True))
    reachable = sum(not own.isdisjoint(known) for own in right)
    questions = len(right)
    return {
        "accuracy": hits / max(questions, 1),
        "confidence95": list(wilson_interval(hits, questions)),
        "questions": questions,
        "reachable": reachable / max(questions, 1),
    }
