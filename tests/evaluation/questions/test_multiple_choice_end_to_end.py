"""Multiple choice with known cosines and match logits: whose questions, which weights, and how scores are weighed."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from programmed_model import ClipTexts, Program, ScriptedTraining, State, World, make_world

from stm.config import LanguageOptimisation, MultipleChoice

TASK = MultipleChoice(
    task="multiple_choice",
    source="people",
    validation_split="val",
    drop_path=0.9,  # would spoil all scores that are taken in training mode
    optimisation=LanguageOptimisation(epochs=3, batch_size=4),
)
TEMPERATURE = 0.2
# The options of each clip's questions: the places of the right ones differ, and a question without options is left out.
Asked = list[list[tuple[tuple[str, ...], int]]]
VAL: Asked = [
    [(("red star", "blue star", "star moves"), 1), (("red star", "star moves", "a star"), 2)],
    [(("star moves", "a star", "red star"), 2)],
    [(("blue star", "a star", "red star"), 0)],
]
TEST: Asked = [
    [(("red square", "square moves", "green square"), 0)],
    [(("green square", "red square", "a square"), 1), (("square moves", "a square", "red square"), 1)],
    [],
    [(("a square", "green square", "square moves"), 2), (("green square", "a square", "red square"), 0)],
]


def write_questions(asked: Asked) -> list[ClipTexts]:
    return [
        ClipTexts([("people", "over the wood")], [("what", "red", None), *(("which", o[r], o) for o, r in own)])
        for own in asked
    ]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    train = [ClipTexts([("machine", "wood"), ("people", text)]) for text in ("left", "right", "a wood", "sand")]
    clips = {"train": train, "val": write_questions(VAL), "test": write_questions(TEST)}
    return make_world(tmp_path_factory.mktemp("choice"), clips, gain=3)


class Split:
    """A split's options and clips, and their cosines and match logits after each epoch."""

    def __init__(self, name: str, asked: Asked, seed: int) -> None:
        self.name = name
        self.questions = [(clip, options, right) for clip, own in enumerate(asked) for options, right in own]
        self.texts = sorted({text for _, options, _ in self.questions for text in options})
        rng, shape = np.random.default_rng(seed), (len(self.texts), len(asked))
        size = shape[0] * shape[1]
        self.cosines = [rng.permutation(np.linspace(-0.3, 0.3, size)).reshape(shape) for _ in range(3)]
        self.logits = [rng.permutation(np.linspace(-2, 2, size)).reshape(shape) for _ in range(3)]

    def choices(self, epoch: int, weight: float, temperature: float = TEMPERATURE) -> list[int]:
        """weight x probability of a match + (1 - weight) x softmax over the options of cosine / temperature."""
        found = []
        for clip, options, _ in self.questions:
            rows = [self.texts.index(text) for text in options]
            powers = [math.exp(self.cosines[epoch][row, clip] / temperature) for row in rows]
            matches = [1 / (1 + math.exp(-self.logits[epoch][row, clip])) for row in rows]
            scores = [
                weight * match + (1 - weight) * power / sum(powers)
                for match, power in zip(matches, powers, strict=True)
            ]
            found.append(int(np.argmax(scores)))
        return found

    def accuracy(self, epoch: int, weight: float) -> float:
        found = self.choices(epoch, weight)
        return float(np.mean([one == right for one, (_, _, right) in zip(found, self.questions, strict=True)]))


SPLITS = {"val": Split("val", VAL, seed=5), "test": Split("test", TEST, seed=2)}


@pytest.fixture(scope="module")
def states(world: World) -> list[State]:
    made = []
    for epoch in range(3):
        program = Program(world.model)
        for split in SPLITS.values():
            features, tokens = world.features(TASK, split.name), world.tokens(split.texts)
            program.add(features, tokens, split.cosines[epoch], split.logits[epoch])
        state = {**program.solve(), "temperature": torch.tensor(TEMPERATURE)}
        made.append({f"model.{name}": tensor for name, tensor in state.items()})
    return made


def expected_rows(epoch: int, weight: float) -> list[dict[str, Any]]:
    split = SPLITS["test"]
    return [
        {
            "key": f"test-{clip:03d}",
            "choice": options[chosen],
            "right": options[right],
            "correct": float(chosen == right),
        }
        for (clip, options, right), chosen in zip(split.questions, split.choices(epoch, weight), strict=True)
    ]


@pytest.mark.parametrize("weight", [0.7, 0.0, 1.0])
def test_the_best_weights_on_validation_answer_the_test_questions(
    weight: float, world: World, states: list[State], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = ScriptedTraining(states)
    monkeypatch.setattr("stm.evaluation.checkpoint_selection.fit_to_test", training)
    found, rows = world.evaluate(TASK.model_copy(update={"matching_weight": weight}), tmp_path)
    scores = [SPLITS["val"].accuracy(epoch, weight) for epoch in range(3)]
    best = int(np.argmax(scores))
    assert found["checkpoint"] == {"chosen": "validation", "epoch": best + 1, "score": pytest.approx(scores[best])}
    assert rows == expected_rows(best, weight)
    assert found["accuracy"] == found["headline"]["value"] == pytest.approx(SPLITS["test"].accuracy(best, weight))
    assert found["accuracy"] == np.mean([row["correct"] for row in rows])
    assert (found["questions"], found["headline"]["chance"]) == (5, pytest.approx(1 / 3))
    assert training.discarded and max(training.drop_rates, default=0) == pytest.approx(0.9)


def test_weights_splits_epochs_and_temperatures_differ() -> None:
    """Otherwise the test above could not tell which was taken."""
    val, test = SPLITS["val"], SPLITS["test"]
    accuracies = {split.name: [split.accuracy(epoch, 0.7) for epoch in range(3)] for split in (val, test)}
    best, of_test = (int(np.argmax(accuracies[name])) for name in ("val", "test"))
    assert best != 2 and accuracies["test"][best] < accuracies["test"][of_test]
    assert accuracies["test"][best] != accuracies["test"][2] and test.choices(best, 0.7) != test.choices(2, 0.7)
    assert len({tuple(test.choices(best, weight)) for weight in (0.0, 0.7, 1.0)}) == 3
    assert all(test.choices(best, 0.7, other) != test.choices(best, 0.7) for other in (1.0, 0.02))


def test_zero_shot_asks_the_pretrained_weights(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stm.evaluation.checkpoint_selection.fit_to_test", None)  # would fail
    found, rows = world.evaluate(TASK.model_copy(update={"optimisation": None}), tmp_path)
    assert found["checkpoint"] == {"chosen": "pretrained"} and len(rows) == 5


def test_training_pairs_are_the_source_s_captions_with_their_own_clips(
    world: World, states: list[State], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = ScriptedTraining(states)
    monkeypatch.setattr("stm.evaluation.checkpoint_selection.fit_to_test", training)
    world.evaluate(TASK.model_copy(update={"max_tokens": 6}), tmp_path)
    captions = ("left", "right", "a wood", "sand")
    assert sorted(training.batch["clip"].tolist()) == [0, 1, 2, 3]
    assert training.batch["caption"] == [captions[clip] for clip in training.batch["clip"].tolist()]
    assert training.batch["tokens"].tolist() == world.tokens(training.batch["caption"], 6).tolist()
