"""What an evaluation reads, and where it writes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stm.config import Text


@dataclass(frozen=True)
class EvaluationInputs:
    """What an evaluation reads, and where it writes.

    Attributes:
        weights: `weights.safetensors` of the pretraining run.
        test: `shards/{split}/{shard}.parquet` of the test split.
        output: folder; gets `metrics.json`, and `predictions.parquet` (`ranks.parquet` of a zero-shot retrieval).
        seed: of everything random.
        train: likewise of the training split; empty where the task names no such split.
        validation: likewise of the split on which the checkpoint is chosen; empty where the task names no such split.
        shared_texts: clips with an equal caption share it: it is one query, and each of these clips is right (SSv2). Else a
            caption means its own clip alone. The benchmark's protocol decides; see
            `stm.datasets.video_text.tasks.has_shared_texts`.
        text: the text encoder of the run's captions, for tasks that encode texts of their own.
        device: by default CUDA when there is any.
    """

    weights: Path
    test: Sequence[Path]
    output: Path
    seed: int
    train: Sequence[Path] = ()
    validation: Sequence[Path] = ()
    shared_texts: bool = False
    text: Text | None = None
    device: str | None = None
