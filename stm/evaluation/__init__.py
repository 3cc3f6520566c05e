"""What pretrained weights are worth: classification by a linear probe or fine-tuning, and the quality of
masks.
"""

from collections.abc import Sequence
from pathlib import Path

from stm.config import EvaluationTask, LinearProbe, PretrainRun


def evaluate(
    task: EvaluationTask,
    run: PretrainRun,
    weights: Path,
    train_indexes: Sequence[Path],
    test_indexes: Sequence[Path],
    output: Path,
    seed: int,
    device: str | None = None,
) -> None:
    """Evaluates a pretraining run's weights on one task.

    Args:
        task: a linear probe or fine-tuning, with its settings.
        run: the pretraining run, for the shape of its clips.
        weights: its `weights.safetensors`.
        train_indexes: `shards/{split}/{shard}.parquet` of the training split.
        test_indexes: likewise of the test split.
        output: folder; gets `metrics.json` and `predictions.parquet` (see `stm.evaluation.results`).

    Raises:
        ValueError: a split has no labels, or the weights are of another architecture than the run's.
    """
    # Imported here, so that `measure_mask_quality` does not load what classification needs.
    from stm.evaluation.finetune import fine_tune
    from stm.evaluation.linear import probe

    splits = (train_indexes, test_indexes)
    if isinstance(task, LinearProbe):
        probe(task, run, weights, *splits, output, seed, device)
    else:
        fine_tune(task, run, weights, *splits, output, seed, device)
