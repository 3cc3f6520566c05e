"""Captioning with known captions: which weights write, whose references count, and that texts stay with their clips."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from programmed_model import ClipTexts, ScriptedTraining, State, World, make_world
from torch import Tensor

from stm.config import Captioning, LanguageOptimisation
from stm.evaluation.captioning.scores import NAMES, CaptionScores
from stm.models.text.decoder import TextDecoder

TASK = Captioning(
    task="captioning",
    source="people",
    validation_split="val",
    drop_path=0.9,  # would spoil all texts that are written in training mode
    max_caption_tokens=7,
    beams=3,
    length_penalty=0.5,
    optimisation=LanguageOptimisation(epochs=3, batch_size=4),
)
PEOPLE: dict[str, list[list[str]]] = {
    "train": [["red circle"], ["a star", "over the wood"], ["left"]],
    "val": [["red", "a star"], ["blue"], ["red"]],
    "test": [["blue", "green"], ["red"], [], ["blue"], ["the blue circle"]],
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    clips = {
        split: [ClipTexts([("machine", "red"), *(("people", text) for text in own)]) for own in captions]
        for split, captions in PEOPLE.items()
    }
    return make_world(tmp_path_factory.mktemp("captions"), clips, gain=3)


def score_exactly(captions: Sequence[str], references: Sequence[Sequence[str]]) -> CaptionScores:
    """Scores that can be told: the share of captions that are one of their own references."""
    right = np.array([caption in own for caption, own in zip(captions, references, strict=True)], dtype=float)
    return CaptionScores(dict.fromkeys(NAMES, right.mean()), dict.fromkeys(NAMES, right))


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], list[list[str]]]]:
    """What is given to the scores, which are quick here."""
    calls: list[tuple[list[str], list[list[str]]]] = []

    def score(captions: list[str], references: list[list[str]]) -> CaptionScores:
        calls.append((captions, references))
        return score_exactly(captions, references)

    monkeypatch.setattr("stm.evaluation.captioning.generate.find_programs", lambda: None)
    monkeypatch.setattr("stm.evaluation.captioning.generate.score_captions", score)
    return calls


def always(world: World, word: str) -> State:
    """Weights that write one word, by a bias that outweighs all else."""
    bias = torch.zeros(world.model.language.vocabulary)
    bias[world.tokens([word])[0, 1]] = 1000.0
    return {"decoder.bert.cls.predictions.bias": bias, "decoder.bert.cls.predictions.decoder.bias": bias}


def test_the_best_weights_on_validation_write_the_test_captions(
    world: World, scored: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = ScriptedTraining([always(world, word) for word in ("blue", "red", "blue")])
    monkeypatch.setattr("stm.evaluation.checkpoint_selection.fit_to_test", training)
    # One word instead of the same one up to the maximum length.
    monkeypatch.setattr(TextDecoder, "_without_special", lambda self, tokens: tokens[:1])
    found, rows = world.evaluate(TASK, tmp_path)
    # Validation: "red" is two of three clips' reference, "blue" one's. Test: one of four clips', and two's.
    assert found["checkpoint"] == {"chosen": "validation", "epoch": 2, "score": pytest.approx(2 / 3)}
    assert [references for _, references in scored[:3]] == [PEOPLE["val"]] * 3
    assert [(row["key"], row["caption"], row["references"]) for row in rows] == [
        (f"test-{clip:03d}", "red", own) for clip, own in enumerate(PEOPLE["test"]) if own
    ]
    assert [row["cider"] for row in rows] == [0, 1, 0, 0]
    assert found["cider"] == found["headline"]["value"] == found["exact"] == pytest.approx(1 / 4)
    assert found["clips"] == 4
    assert training.discarded and max(training.drop_rates, default=0) == pytest.approx(0.9)


def test_a_clip_s_caption_is_written_from_its_own_tokens_as_the_task_says(
    world: World, scored: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = world.features(TASK, "test")
    words = ("left", "right", "over", "sand", "wood")  # one per test clip
    asked = []

    def generate(self: Any, memory: Tensor, beams: int, max_tokens: int, length_penalty: float) -> list[list[int]]:
        asked.append((beams, max_tokens, length_penalty))
        assert not self.training
        nearest = torch.cdist(memory.flatten(1), features.flatten(1)).argmin(dim=1)
        return [[int(world.tokens([words[int(clip)]])[0, 1])] for clip in nearest]

    monkeypatch.setattr("stm.evaluation.checkpoint_selection.fit_to_test", ScriptedTraining([]))
    monkeypatch.setattr(TextDecoder, "generate", generate)
    monkeypatch.setattr("stm.evaluation.language_clips.CLIPS_PER_BATCH", 2)
    _, rows = world.evaluate(TASK.model_copy(update={"validation_split": None}), tmp_path)
    assert [(row["key"], row["caption"]) for row in rows] == [
        (f"test-{clip:03d}", words[clip]) for clip, own in enumerate(PEOPLE["test"]) if own
    ]
    assert asked == [(3, 7, 0.5)] * 3


def test_training_pairs_are_the_source_s_captions_with_their_own_clips(
    world: World, scored: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = ScriptedTraining([])
    monkeypatch.setattr("stm.evaluation.checkpoint_selection.fit_to_test", training)
    world.evaluate(TASK.model_copy(update={"validation_split": None}), tmp_path)
    pairs = [(clip, text) for clip, own in enumerate(PEOPLE["train"]) for text in own]
    rows = zip(training.batch["clip"].tolist(), training.batch["tokens"].tolist(), strict=True)
    assert sorted(rows) == sorted((clip, world.tokens([text], 7)[0].tolist()) for clip, text in pairs)
