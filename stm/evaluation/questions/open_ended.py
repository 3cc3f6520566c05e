"""Open-ended question answering: a decoder ranks the benchmark's answers, or those of the training split (UMT)."""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor, nn

from stm.config import LanguageRun, QuestionAnswering
from stm.data.dataset import ClipDataset
from stm.data.loader import Batch
from stm.distributed.process import Process
from stm.distributed.shares import join_rows
from stm.evaluation.checkpoint_selection import tune, untrained
from stm.evaluation.inputs import EvaluationInputs
from stm.evaluation.language_clips import QuestionClips, encode_clips, load_model, open_clips
from stm.evaluation.metrics import normalise, wilson_interval
from stm.evaluation.results import make_evaluation_receipt, write_metrics
from stm.evaluation.tuning import AnswerTuning, make_tuning, text_length, with_texts
from stm.jobs.progress import Progress
from stm.models.video_language import ANSWERS
from stm.models.weights import zoo
from stm.models.weights.checks import check_tensors
from stm.storage.tables import write_table

PREDICTIONS_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("question", pa.string(), nullable=False),
        pa.field("answer", pa.string(), nullable=False),
        pa.field("right", pa.string(), nullable=False),
    ]
)

QUESTIONS_PER_BATCH = 64


def answer(task: QuestionAnswering, run: LanguageRun, inputs: EvaluationInputs, process: Process) -> None:
    """Trains model and decoder on the training questions, then answers the test questions; see `stm.evaluation.evaluate`.

    The candidates are the benchmark's own list (`inputs.answers`); without one, the answers of the training split. Every
    question counts by itself, also if a clip has the same question twice (as by question id in UMT's release). With 0 epochs,
    the decoder is the release's.
    """
    torch.manual_seed(inputs.seed)
    model = load_model(inputs.weights, run, task, task.drop_path)
    module = AnswerTuning(model, process).to(process.device)
    train = _open_questions(task, run, inputs)
    counts = {} if train is None else count_answers(question.answer for _, question in train.pairs)
    answers = list(inputs.answers) or list(counts)[: task.answers]
    tokenizer, length = model.language.tokenizer, text_length(task, run)
    candidates = tokenizer.encode_targets(answers, task.max_answer_tokens)

    def read(batch: Batch) -> dict[str, Tensor]:
        assert train is not None  # it trains
        questions = [train.pairs[number][1] for number in batch["label"].tolist()]
        return {
            "tokens": tokenizer.encode([question.question for question in questions], length),
            "answers": tokenizer.encode_targets([question.answer for question in questions], task.max_answer_tokens),
        }

    answerer = _Answerer(module, candidates.to(process.device), answers, task, run, process)
    measure = None
    if inputs.validation:
        validation = open_clips(task, run, inputs.validation, inputs.seed, False)

        def measure(_: nn.Module) -> float:
            predicted, rows = answerer.answer(validation)
            return float(open_ended_metrics(predicted, [row["right"] for row in rows], answers)["accuracy"])

    which, discard = untrained(task), None
    if task.trains:
        assert train is not None
        plan, batches = make_tuning("questions", task, run, inputs, train, process)
        which, discard = tune(module, with_texts(batches, read), plan, inputs.output, process, measure)
    else:
        _load_decoder(module, inputs.weights)
    test = open_clips(task, run, inputs.test, inputs.seed, False)
    predicted, rows = answerer.answer(test)
    if not process.first:
        return
    receipt = make_evaluation_receipt(task, run, inputs, test, train)
    figures = open_ended_metrics(predicted, [row["right"] for row in rows], answers)
    counts = counts or count_answers(row["right"] for row in rows)
    metrics = {
        **figures,
        "answers": len(answers),
        "answers_from": "benchmark" if inputs.answers else "training split",
        # Its share in the training split: about the accuracy of always predicting it; without one, in the test split.
        "most_frequent_answer": max(counts.values()) / sum(counts.values()),
        "by_question": by_question(predicted, rows),
        "checkpoint": which,
    }
    rows = [{**row, "answer": given} for row, given in zip(rows, predicted, strict=True)]
    write_table(inputs.output / "predictions.parquet", pa.Table.from_pylist(rows, schema=PREDICTIONS_SCHEMA), receipt)
    write_metrics(task, inputs, metrics, receipt)
    if discard is not None:
        discard()


def _open_questions(task: QuestionAnswering, run: LanguageRun, inputs: EvaluationInputs) -> QuestionClips | None:
    """The training questions; None if nothing is trained and the benchmark has a list of answers."""
    if not inputs.train:
        return None
    train = open_clips(task, run, inputs.train, inputs.seed, True, kind=QuestionClips)
    assert isinstance(train, QuestionClips)
    return train


def _load_decoder(module: AnswerTuning, weights: Path) -> None:
    """Loads the decoder of a release that was fine-tuned on questions.

    Raises:
        WeightsError: the weights have no decoder of answers, or one of different names or shapes.
    """
    tensors, _ = zoo.load_extra(weights, ANSWERS)
    check_tensors(tensors, module.decoder.weights(), f"{weights} has a decoder of answers")
    module.decoder.load_weights(tensors)


class _Answerer:
    """Answers every question of a split."""

    def __init__(
        self,
        module: AnswerTuning,
        candidates: Tensor,
        answers: list[str],
        task: QuestionAnswering,
        run: LanguageRun,
        process: Process,
    ) -> None:
        self.module = module
        self.candidates = candidates
        self.answers = answers
        self.task = task
        self.run = run
        self.process = process

    @torch.inference_mode()
    def answer(self, dataset: ClipDataset) -> tuple[list[str], list[dict[str, Any]]]:
        """The chosen answers, and the "key", "question" and "right" answer of each question. The processes share the questions
        by clip.

        Raises:
            ValueError: no clip has a question.
        """
        task, module = self.task, self.module.eval()
        asked = [(number, question) for number in range(len(dataset)) for question in dataset.index[number].questions]
        rows = [{"key": dataset.index[n].key, "question": q.question, "right": q.answer} for n, q in asked]
        if not rows:
            raise ValueError(f"no clip of {dataset.index.tars[0].parent} has a question")
        tokens = module.model.language.tokenizer.encode([row["question"] for row in rows], text_length(task, self.run))
        device, owners = self.process.device, torch.tensor([number for number, _ in asked])
        encoded = encode_clips(module.model, dataset, self.process, self.run.workers, task.precision)
        places = torch.isin(owners, encoded.clips).nonzero()[:, 0]
        predicted = list[int]()
        with Progress("questions", len(places), "questions") as progress:
            for batch in places.split(QUESTIONS_PER_BATCH) if len(places) else ():
                questions = tokens[batch].to(device)
                memory = module.encode_questions(questions, encoded.of(owners[batch]).to(device).float())
                scores = module.decoder.rank(
                    memory, self.candidates, task.depth, task.ranking, module.is_word(questions)
                )
                predicted += choose_answer(scores.cpu(), self.answers)
                progress.advance(len(batch))
        numbers = join_rows(self.process, places, torch.tensor(predicted, dtype=torch.int64), len(rows))
        return [self.answers[number] for number in numbers.tolist()], rows


def by_question(predicted: list[str], rows: list[dict[str, Any]], most: int = 20) -> dict[str, float]:
    """Accuracy by the first two words of the question, as in papers; only the `most` most frequent groups."""
    groups: dict[str, list[bool]] = {}
    for given, row in zip(predicted, rows, strict=True):
        words = " ".join(row["question"].lower().split()[:2])
        groups.setdefault(words, []).append(normalise(given) == normalise(row["right"]))
    largest = sorted(groups, key=lambda words: (-len(groups[words]), words))[:most]
    return {words: sum(groups[words]) / len(groups[words]) for words in sorted(largest)}


def count_answers(answers: Iterable[str]) -> dict[str, int]:
    """The answers of a split and their counts: the most frequent first, ties in alphabetical order; empty ones excluded.

    Args:
        answers: the answer to each question, with repetitions.
    """
    counts = Counter(map(normalise, answers))
    counts.pop("", None)
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def choose_answer(scores: Tensor, answers: Sequence[str]) -> list[int]:
    """The index of the answer with the highest score for each question; ties go to the first answer in the list.

    Args:
        scores: float [B, A], from `TextDecoder.rank`; minus infinity for an answer that was not ranked.
        answers: the A answers, in the order of the columns.

    Raises:
        ValueError: the numbers of answers and columns differ, or a row has a NaN or no finite score.
    """
    if scores.dim() != 2 or scores.shape[1] != len(answers):
        raise ValueError(f"scores {tuple(scores.shape)} must be [B, {len(answers)}], one column per answer")
    ordered, numbers = scores.sort(dim=1, descending=True, stable=True)  # NaN sorts first
    if not bool(ordered[:, :1].isfinite().all()):
        raise ValueError("a question has no answer with a finite score: were the weights trained to the end?")
    best: list[int] = numbers[:, 0].tolist()
    return best


def open_ended_metrics(predicted: Sequence[str], right: Sequence[str], answers: Iterable[str]) -> dict[str, Any]:
    """Exact-match accuracy.

    Args:
        predicted: the chosen answer of each question.
        right: the answer of each question.
        answers: all candidate answers.

    Returns:
        `accuracy`, `confidence95` (Wilson interval), `questions`, and `reachable`: the share of questions whose answer is
        among `answers`, which is an upper bound on the accuracy.

    Raises:
        ValueError: the numbers of predictions and questions differ, or a question has no answer.
    """
    if len(predicted) != len(right):
        raise ValueError(f"{len(predicted)} predictions for {len(right)} questions")
    expected = [normalise(answer) for answer in right]
    if unanswered := expected.count(""):
        raise ValueError(f"{unanswered} questions have no answer: leave them out")
    known = {normalise(answer) for answer in answers}
    hits = sum(normalise(given) == answer for given, answer in zip(predicted, expected, strict=True))
    questions = len(expected)
    return {
        "accuracy": hits / max(questions, 1),
        "confidence95": list(wilson_interval(hits, questions)),
        "questions": questions,
        "reachable": sum(answer in known for answer in expected) / max(questions, 1),
    }
