"""Settings that all evaluations with text share: that each reaches the clips, the training and the test."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from programmed_model import ClipTexts, ScriptedTraining, World, make_world
from torch import Tensor

from stm.config import (
    Captioning,
    LanguageAugmentation,
    LanguageOptimisation,
    LanguageTask,
    MultipleChoice,
    QuestionAnswering,
    VideoTextRetrieval,
)
from stm.evaluation.captioning.scores import NAMES, CaptionScores
from stm.evaluation.language_clips import open_clips
from stm.models.vit import VideoEncoder
from stm.storage.files import sha256_file

SECTIONS: dict[str, type[Any]] = {
    "video_text_retrieval": VideoTextRetrieval,
    "question_answering": QuestionAnswering,
    "multiple_choice": MultipleChoice,
    "captioning": Captioning,
}
TUNING = LanguageOptimisation(epochs=3, batch_size=4, accumulate=2, learning_rate=0.01, clip_grad=2.0)
STORED = 6  # frames of a clip: there is one window of as many


def make_task(name: str, **changes: Any) -> LanguageTask:
    task: LanguageTask = SECTIONS[name].model_validate({"task": name, "optimisation": TUNING, **changes})
    return task


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    texts = ("left", "right", "over", "wood", "sand")
    clips = [ClipTexts([("people", t)], [("which", t, (t, texts[n - 1]))]) for n, t in enumerate(texts)]
    return make_world(tmp_path_factory.mktemp("settings"), {"train": clips, "val": clips[:2], "test": clips[:3]})


class Seen:
    """What the encoder is given, and whether it computes in bfloat16."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.halved: list[bool] = []
        forward = VideoEncoder.forward

        def note(encoder: VideoEncoder, video: Tensor, *arguments: Any, **options: Any) -> Tensor:
            assert not encoder.training
            self.shapes.append(tuple(video.shape[1:]))
            self.halved.append(torch.is_autocast_enabled("cpu"))
            return forward(encoder, video, *arguments, **options)

        monkeypatch.setattr(VideoEncoder, "forward", note)


def tune_and_test(world: World, task: LanguageTask, output: Path, monkeypatch: pytest.MonkeyPatch, **run: Any) -> Any:
    """`metrics.json`, and the training that it skips after its first batch."""
    scores = CaptionScores(dict.fromkeys(NAMES, 0.5), {name: np.full(3, 0.5) for name in NAMES})
    monkeypatch.setattr("stm.evaluation.captioning.generate.find_programs", lambda: None)
    monkeypatch.setattr("stm.evaluation.captioning.generate.score_captions", lambda *_: scores)
    training = ScriptedTraining([])
    monkeypatch.setattr("stm.evaluation.checkpoint_selection.fit_to_test", training)
    other = World(world.folder, world.splits, world.run.model_copy(update=run), world.weights, world.model)
    return other.evaluate(task, output)[0], training


@pytest.mark.parametrize("name", list(SECTIONS))
def test_frames_crops_and_augmentation_are_the_task_s(
    name: str, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = LanguageAugmentation(crop="center", flip=False)
    task = make_task(name, frames=STORED, augmentation=plain, test_crop="center")
    seen = Seen(monkeypatch)
    _, training = tune_and_test(world, task, tmp_path, monkeypatch)
    assert set(seen.shapes) == {(STORED, 3, 32, 32)}
    # Without augmentation, and with all frames in the window, a training clip is as in a test.
    clips = open_clips(task, world.run, [world.splits["train"]], 0, False)
    assert len(training.batch["video"]) == 2  # half of a step's pairs
    for clip, video in zip(training.batch["clip"].tolist(), training.batch["video"], strict=True):
        assert np.array_equal(video, clips[clip][0]["video"])
    augmented = make_task(name, frames=STORED)
    _, training = tune_and_test(world, augmented, tmp_path / "augmented", monkeypatch)
    clips = open_clips(augmented, world.run, [world.splits["train"]], 0, False)
    for clip, video in zip(training.batch["clip"].tolist(), training.batch["video"], strict=True):
        assert not np.array_equal(video, clips[clip][0]["video"])


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("name", list(SECTIONS))
def test_precision_optimisation_and_checkpoints_are_the_task_s_and_the_run_s(
    name: str, precision: str, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Seen(monkeypatch)
    task = make_task(name, precision=precision)
    found, training = tune_and_test(world, task, tmp_path, monkeypatch, checkpoint_every=7, checkpoints_kept=3)
    assert set(seen.halved) == {precision == "bf16"}
    plan = training.plan
    assert (plan.precision, plan.checkpoint_every, plan.checkpoints_kept, plan.seed) == (precision, 7, 3, 0)
    assert plan.optimisation == TUNING and plan.steps == 3  # an epoch of five pairs has one step of four
    assert found["receipt"]["settings"]["task"] == task.fingerprint() == found["settings"]
    assert found["receipt"]["weights"] == sha256_file(world.weights)
    assert found["receipt"]["test"] == {"test-00000": sha256_file(world.splits["test"].with_suffix(".tar"))}
