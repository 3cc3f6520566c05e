"""Open-ended questions with known answers: whose answers are the candidates, which weights answer, which clip is asked about."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from programmed_model import ClipTexts, ScriptedTraining, State, World, make_world
from torch import Tensor

from stm.config import LanguageOptimisation, QuestionAnswering
from stm.evaluation.questions.open_ended import by_question
from stm.models.text.decoder import TextDecoder

TASK = QuestionAnswering(
    task="question_answering",
    validation_split="val",
    max_tokens=6,
    drop_path=0.9,  # would spoil all scores that are taken in training mode
    optimisation=LanguageOptimisation(epochs=3, batch_size=6),
)
# (question, answer) pairs. "sand" is an answer of the test split alone, "wood" of training alone.
ASKED = {
    "train": [
        [("what color", "red"), ("what moves", "blue")],
        [("what color", "blue"), ("which star", "wood")],
        [("what color", "blue"), ("what moves", "red")],
    ],
    "val": [[("what color", "red"), ("what color", "wood")], [("which star", "blue")], [("what moves", "red")]],
    "test": [
        [("what color", "blue"), ("what moves", "blue")],
        [],
        [("what color", "sand"), ("which star", "red"), ("which star", "sand")],
    ],
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    clips = {
        split: [ClipTexts([], [(question, answer, None) for question, answer in own]) for own in asked]
        for split, asked in ASKED.items()
    }
    return make_world(tmp_path_factory.mktemp("questions"), clips, gain=3)


@pytest.fixture(scope="module")
def states(world: World) -> list[State]:
    """After each epoch another word is the answer to everything; of the candidates, where that word is none, "red" follows."""
    made = []
    for word in ("blue", "red", "sand"):
        bias = torch.zeros(world.model.language.vocabulary)
        bias[world.tokens(["red"])[0, 1]] = 500.0
        bias[world.tokens([word])[0, 1]] = 1000.0
        made.append({"decoder.bert.cls.predictions.bias": bias, "decoder.bert.cls.predictions.decoder.bias": bias})
    return made


def test_the_best_weights_on_validation_answer_the_test_questions(
    world: World, states: list[State], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = ScriptedTraining([*states[:2], states[0]])
    monkeypatch.setattr("stm.evaluation.checkpoint_selection.fit_to_test", training)
    found, rows = world.evaluate(TASK, tmp_path)
    # Validation: 1 of 4 blue, 2 of 4 red; test: 2 of 5 blue, 1 of 5 red.
    assert found["checkpoint"] == {"chosen": "validation", "epoch": 2, "score": 0.5}
    assert found["accuracy"] == found["headline"]["value"] == pytest.approx(1 / 5)
    assert rows == [
        {"key": f"test-{clip:03d}", "question": question, "answer": "red", "right": right}
        for clip, own in enumerate(ASKED["test"])
        for question, right in own
    ]
    assert found["by_question"] == {"what color": 0, "what moves": 0, "which star": 0.5}
    # Six training answers, three of them "blue"; of five test answers, "sand" twice was in no training answer.
    assert found["most_frequent_answer"] == found["headline"]["chance"] == pytest.approx(3 / 6)
    assert (found["answers"], found["answers_from"], found["reachable"]) == (3, "training split", pytest.approx(3 / 5))
    assert training.discarded and max(training.drop_rates, default=0) == pytest.approx(0.9)


def test_the_candidates_are_the_training_answers_and_no_others(
    world: World, states: list[State], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights would say "sand", which only the test split and the benchmark's list know."""
    for name, changes, answers, expected in (
        ("train", {}, (), ("red", 3)),
        ("frequent", {"answers": 1}, (), ("blue", 1)),  # of blue 3, red 2, wood 1
        ("two", {"answers": 2}, (), ("red", 2)),
        ("benchmark", {"answers": 1}, ("star", "sand", "red"), ("sand", 3)),  # the limit is for training answers
    ):
        monkeypatch.setattr("stm.evaluation.checkpoint_selection.fit_to_test", ScriptedTraining([states[2]]))
        found, rows = world.evaluate(TASK.model_copy(update=changes), tmp_path / name, answers=answers)
        assert ({row["answer"] for row in rows}, found["answers"]) == ({expected[0]}, expected[1])


def test_training_asks_each_question_about_its_own_clip_with_its_own_answer(
    world: World, states: list[State], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = ScriptedTraining(states)
    monkeypatch.setattr("stm.evaluation.checkpoint_selection.fit_to_test", training)
    world.evaluate(TASK.model_copy(update={"max_answer_tokens": 4}), tmp_path)
    batch = training.batch
    asked = [
        (clip, world.tokens([question], 6)[0].tolist(), world.tokens([answer], 4)[0].tolist())
        for clip, own in enumerate(ASKED["train"])
        for question, answer in own
    ]
    columns = (batch["clip"].tolist(), batch["tokens"].tolist(), batch["answers"].tolist())
    assert sorted(zip(*columns, strict=True)) == sorted(asked)


def score(decoder: TextDecoder, memory: Tensor, candidates: Tensor, depth: int, twice: bool) -> list[float]:
    """Log-probabilities of the answers to one question, one answer at a time, without padding; -inf beyond the depth."""
    each = []
    for answer in candidates:
        words = answer[answer != decoder.pad_id][None]
        with torch.no_grad():
            logits = decoder.bert(input_ids=words[:, :-1], encoder_hidden_states=memory, use_cache=False).logits
        each.append(logits.log_softmax(-1)[0].gather(1, words[0, 1:, None])[:, 0].tolist())
    first = sorted(range(len(each)), key=lambda number: -each[number][0])[:depth]
    return [sum(own) + twice * own[0] if number in first else -math.inf for number, own in enumerate(each)]


@pytest.mark.parametrize(("ranking", "depth"), [("sum", 128), ("albef", 128), ("sum", 2)])
def test_each_question_is_answered_from_its_own_clip(
    ranking: str, depth: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random weights, strong enough for answers to depend on the clip: one pair after the other gives the same answers."""
    answers = ("red", "blue moves over", "green", "circle", "square", "star moves", "left a", "right", "over", "sand")
    questions = [(question, "red", None) for question in ("what color", "what moves", "which star is over the wood")]
    clips = {
        "train": [ClipTexts([], [("what", answer, None)]) for answer in answers],
        "val": [ClipTexts([], questions)],
        "test": [ClipTexts([], questions[: 1 + number % 3]) for number in range(6)],
    }
    world = make_world(tmp_path / "world", clips, gain=8)
    found: list[Tensor] = []
    rank = TextDecoder.rank

    def note(*arguments: Any) -> Tensor:
        found.append(rank(*arguments))
        return found[-1]

    monkeypatch.setattr("stm.evaluation.checkpoint_selection.fit_to_test", ScriptedTraining([]))
    monkeypatch.setattr(TextDecoder, "rank", note)
    task = TASK.model_copy(update={"ranking": ranking, "depth": depth, "validation_split": None})
    _, rows = world.evaluate(task, tmp_path / "out", answers=answers)
    features, model = world.features(task, "test"), world.model
    decoder = TextDecoder.of(model.language).eval()
    expected, scores = [], []
    for number, clip in enumerate(clips["test"]):
        for question, _, _ in clip.questions:
            tokens = world.tokens([question], 6)
            tokens = tokens[:, tokens[0] != model.language.pad_id]
            with torch.no_grad():
                memory = model.fuse(model.encode_text(tokens), tokens, features[number : number + 1])
            scores.append(score(decoder, memory, world.tokens(answers, 5), depth, ranking == "albef"))
            expected.append((f"test-{number:03d}", question, answers[scores[-1].index(max(scores[-1]))]))
    torch.testing.assert_close(torch.cat(found), torch.tensor(scores), rtol=1e-3, atol=1e-3)
    assert [(row["key"], row["question"], row["answer"]) for row in rows] == expected
    of_one_question = {answer for _, question, answer in expected if question == "what color"}
    assert len(of_one_question) > 1 and len({answer for _, _, answer in expected}) > 2


def test_questions_are_grouped_by_their_first_two_words() -> None:
    rows = [
        {"question": text, "right": right} for text, right in (("What is it", "a"), ("what is he", "B"), ("Who", "c"))
    ]
    assert by_question(["a", "b", "d"], rows) == {"what is": 1, "who": 0}
    assert by_question(["a", "x", "d"], rows, most=1) == {"what is": 0.5}
