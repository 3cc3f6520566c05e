"""The inputs and the output folder of an evaluation."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stm.config import Text
from stm.training.trackers import TENSORBOARD

DIVISION = {"processes", "nodes", "parallel"}
"""How the work is divided affects results only through rounding, and a fine-tuning may be resumed with a different division."""


@dataclass(frozen=True)
class EvaluationInputs:
    """The inputs and the output folder of an evaluation.

    Attributes:
        weights: `weights.safetensors` of the pretraining run.
        test: `shards/{split}/{shard}.parquet` of the test split.
        output: the folder for `metrics.json` and `predictions.parquet` (`ranks.parquet` for zero-shot retrieval).
        seed: seed of all random numbers.
        train: the shards of the training split; empty if the task names no such split.
        validation: the shards of the split on which the checkpoint is selected; empty if the task names no such split.
        shared_texts: if True, a caption shared by several clips is one query, and each of these clips is correct
            (SSv2); if False, a caption belongs only to its own clip. Defined by the benchmark's protocol; see
            `stm.datasets.video_text.tasks.has_shared_texts`.
        answers: the benchmark's own list of answers, among which questions are answered; empty: those of the training
            split (see `stm.datasets.video_text.tasks.candidate_answers`).
        truth: `generated/truth.parquet` of the test split's dataset, for tasks that compare with true boxes; None for others.
        frames: `frames/{shard}.parquet` of the test split's shards, for the same tasks: which frames are stored.
        text: the text encoder of the run's captions, for tasks that encode their own texts.
        device: None selects CUDA if available.
        trackers: where the values of a training and the headline are shown, as in the config.
    """

    weights: Path
    test: Sequence[Path]
    output: Path
    seed: int
    train: Sequence[Path] = ()
    validation: Sequence[Path] = ()
    shared_texts: bool = False
    answers: tuple[str, ...] = ()
    truth: Path | None = None
    frames: Sequence[Path] = ()
    text: Text | None = None
    device: str | None = None
    trackers: tuple[str, ...] = TENSORBOARD
