"""Retrieval with re-ranking whose cosines and match logits are known: which weights, captions, candidates and clips count."""

from itertools import pairwise
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from programmed_model import ClipTexts, Program, ScriptedTraining, State, World, make_world

from stm.config import LanguageOptimisation, VideoTextRetrieval

DEPTH = 2
TASK = VideoTextRetrieval(
    task="video_text_retrieval",
    source="people",
    validation_split="val",
    depth=DEPTH,
    drop_path=0.9,  # would spoil all scores that are taken in training mode
    optimisation=LanguageOptimisation(epochs=3, batch_size=4),
)
# Two clips of a split have the same caption; texts of different splits differ.
PEOPLE: dict[str, list[list[str]]] = {
    "train": [["red circle", "moves"], ["blue circle", "over the wood", "a wood"], ["a star", "left"], ["a star"]],
    "val": [["blue star"], ["green star", "star moves"], ["a red star"], ["a red star"], ["left"]],
    "test": [
        ["blue square"],
        ["green square", "square moves"],
        ["a red square"],
        [],
        ["a red square"],
        ["right"],
        ["sand"],
    ],
}
OTHERS = "over wood"  # the same for all clips: no model could find one by it


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    clips = {
        # The other source comes first where clips have both.
        split: [ClipTexts([("machine", OTHERS), *(("people", text) for text in own)]) for own in captions]
        for split, captions in PEOPLE.items()
    }
    return make_world(tmp_path_factory.mktemp("retrieval"), clips, gain=3)


class Split:
    """The texts of a split, its clips with captions, and what the model says about them after each epoch."""

    def __init__(self, name: str, good: list[float], seed: int) -> None:
        """
        Args:
            good: for each epoch the share of texts whose clip is the most similar one; for the others it is the least.
        """
        self.name = name
        self.captioned = [number for number, own in enumerate(PEOPLE[name]) if own]
        captions = [PEOPLE[name][number] for number in self.captioned]
        self.pairs = [(text, clip) for clip, own in enumerate(captions) for text in own]
        self.texts = list(dict.fromkeys(text for text, _ in self.pairs))
        rng, shape = np.random.default_rng(seed), (len(self.texts), len(captions))
        size = shape[0] * shape[1]
        self.cosines, self.logits = [], []
        for share in good:
            cosines = rng.permutation(np.linspace(-0.3, 0.3, size)).reshape(shape)
            for number, text in enumerate(self.texts):
                right = next(clip for own, clip in self.pairs if own == text)
                ends = cosines[number].argmax() if number < share * len(self.texts) else cosines[number].argmin()
                cosines[number, [right, ends]] = cosines[number, [ends, right]]
            self.cosines.append(cosines)
            self.logits.append(rng.permutation(np.linspace(-3, 3, size)).reshape(shape))

    def queries(self, shared: bool) -> list[tuple[str, set[int]]]:
        if not shared:
            return [(text, {clip}) for text, clip in self.pairs]
        return [(text, {clip for own, clip in self.pairs if own == text}) for text in self.texts]

    def ranks(self, epoch: int, shared: bool, depth: int | None) -> dict[str, list[float]]:
        """Of each query and each clip, by loops; `depth` None: of the dual encoder."""
        asked = self.queries(shared)
        rows = [self.texts.index(text) for text, _ in asked]
        cosines, logits = self.cosines[epoch][rows], self.logits[epoch][rows]
        clips = range(cosines.shape[1])
        owners = [{row for row, (_, right) in enumerate(asked) if clip in right} for clip in clips]
        return {
            "text_to_video": [rank(cosines[row], logits[row], right, depth) for row, (_, right) in enumerate(asked)],
            "video_to_text": [rank(cosines[:, clip], logits[:, clip], owners[clip], depth) for clip in clips],
        }


def rank(cosines: np.ndarray, logits: np.ndarray, right: set[int], depth: int | None) -> float:
    """The mean rank of the best right candidate over all orders of equal ones."""
    ordered = sorted(cosines, reverse=True)
    last = -np.inf if depth is None or depth >= len(ordered) else ordered[depth - 1]
    keys = [
        (cosine,) if depth is None else (cosine >= last, logit if cosine >= last else 0.0, cosine)
        for cosine, logit in zip(cosines.tolist(), logits.tolist(), strict=True)
    ]
    best = max(keys[number] for number in right)
    equal = [number for number, key in enumerate(keys) if key == best]
    wrong = sum(number not in right for number in equal)
    return 1 + sum(key > best for key in keys) + wrong / (len(equal) - wrong + 1)


def recalls(ranks: list[float]) -> dict[str, float]:
    return {f"r{depth}": sum(one <= depth for one in ranks) / len(ranks) for depth in (1, 5, 10)}


# Best on the validation clips after the second epoch, on the test clips after the third.
VAL = Split("val", [0.2, 1.0, 0.6], seed=1)
TEST = Split("test", [0.6, 0.4, 1.0], seed=2)


def score(split: Split, epoch: int, shared: bool) -> float:
    ranks = split.ranks(epoch, shared, None).values()
    return float(np.mean([value for way in ranks for value in recalls(way).values()]))


@pytest.fixture(scope="module")
def states(world: World) -> list[State]:
    made = []
    for epoch in range(3):
        program = Program(world.model)
        for split in (VAL, TEST):
            features = world.features(TASK, split.name)[split.captioned]
            program.add(features, world.tokens(split.texts), split.cosines[epoch], split.logits[epoch])
        made.append({f"model.{name}": tensor for name, tensor in program.solve().items()})
    return made


def check_metrics(found: dict[str, Any], rows: list[dict[str, Any]], epoch: int, shared: bool, depth: int) -> None:
    for name, own_depth in (("dual_encoder", None), ("reranked", depth)):
        ranks = TEST.ranks(epoch, shared, own_depth)
        for way, expected in ranks.items():
            assert {key: found[name][way][key] for key in ("r1", "r5", "r10")} == pytest.approx(recalls(expected))
            assert found[name][way]["mean_rank"] == pytest.approx(np.mean(expected))
            assert found[name][way]["median_rank"] == pytest.approx(np.median(expected))
        column = "rank" if own_depth is None else "reranked"
        keys = [f"test-{number:03d}" for number in TEST.captioned]
        expected_rows = {
            (tuple(keys[clip] for clip in sorted(right)), text): one
            for (text, right), one in zip(TEST.queries(shared), ranks["text_to_video"], strict=True)
        }
        assert {(tuple(row["keys"]), row["caption"]): row[column] for row in rows} == pytest.approx(expected_rows)
    assert all(one["keys"] <= other["keys"] for one, other in pairwise(rows))
    clips = len(TEST.captioned)
    chance = [
        np.mean([1 - comb(clips - len(right), k) / comb(clips, k) for _, right in TEST.queries(shared)]) for k in (1, 5)
    ]
    assert [found["chance"][name] for name in ("r1", "r5", "r10")] == pytest.approx([*chance, 1])
    assert found["headline"]["value"] == found["reranked"]["text_to_video"]["r1"]
    assert found["headline"]["chance"] == pytest.approx(chance[0])
    assert found["clips_without_caption"] == 1


@pytest.mark.parametrize("shared", [False, True])
def test_the_best_weights_on_validation_are_tested_on_the_test_clips(
    shared: bool, world: World, states: list[State], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = {split.name: [score(split, epoch, shared) for epoch in range(3)] for split in (VAL, TEST)}
    assert np.argmax(scores["val"]) == 1 and np.argmax(scores["test"]) == 2
    assert score(VAL, 1, shared) != score(VAL, 1, not shared)
    training = ScriptedTraining(states)
    monkeypatch.setattr("stm.evaluation.checkpoint_selection.fit_to_test", training)
    found, rows = world.evaluate(TASK, tmp_path, shared_texts=shared)
    assert found["checkpoint"] == {"chosen": "validation", "epoch": 2, "score": pytest.approx(scores["val"][1])}
    check_metrics(found, rows, 1, shared, DEPTH)
    assert training.discarded and not list(tmp_path.glob("best.*"))


def test_without_validation_the_last_weights_are_tested(
    world: World, states: list[State], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stm.evaluation.checkpoint_selection.fit_to_test", ScriptedTraining(states))
    deep = TASK.model_copy(update={"validation_split": None, "depth": 128})
    found, rows = world.evaluate(deep, tmp_path)
    assert found["checkpoint"]["chosen"] == "last"
    check_metrics(found, rows, 2, False, 128)


def test_depths_differ() -> None:
    """Otherwise the tests above could not tell whose depth was taken."""
    assert TEST.ranks(1, False, DEPTH) != TEST.ranks(1, False, 128) != TEST.ranks(1, False, None)


def test_training_pairs_are_the_source_s_captions_with_their_own_clips(
    world: World, states: list[State], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = ScriptedTraining(states)
    monkeypatch.setattr("stm.evaluation.checkpoint_selection.fit_to_test", training)
    world.evaluate(TASK.model_copy(update={"max_tokens": 6}), tmp_path)
    batch, plan = training.batch, training.plan
    assert len(batch["caption"]) == 4 and plan.steps_per_epoch == 2  # eight pairs of four clips
    assert plan.optimisation == TASK.optimisation
    for clip, caption in zip(batch["clip"].tolist(), batch["caption"], strict=True):
        assert caption in PEOPLE["train"][clip]
    assert batch["tokens"].tolist() == world.tokens(batch["caption"], 6).tolist()
    assert max(training.drop_rates, default=0) == pytest.approx(0.9)
