"""Evaluations of runs with text, as UMT's second stage is evaluated: each file one task, from weights to `metrics.json`."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from stm.config import Captioning, LanguageRun, LanguageTask, MultipleChoice, VideoTextRetrieval


class Splits(NamedTuple):
    """Indexes of the packed shards: `shards/{split}/{shard}.parquet`, and what their benchmark says of their captions."""

    train: Sequence[Path]
    validation: Sequence[Path]  # empty where the task names no such split
    test: Sequence[Path]
    # Clips with an equal caption share it: it asks once, and each of them is right (SSv2). Else a caption means its clip alone.
    shared_texts: bool = False


def evaluate_language(
    task: LanguageTask,
    run: LanguageRun,
    weights: Path,
    splits: Splits,
    output: Path,
    seed: int,
    device: str | None = None,
) -> None:
    """Evaluates a run's weights on one task with text; see `stm.evaluation.evaluate`.

    Writes `metrics.json` and `predictions.parquet`. `checkpoint` in the former says which weights were tested: those as
    pretrained, the last ones of fine-tuning, or the best on the validation split; never the best on the test split.
    """
    if isinstance(task, VideoTextRetrieval):
        from stm.evaluation.retrieval.video_text import retrieve_texts

        retrieve_texts(task, run, weights, splits, output, seed, device)
    elif isinstance(task, MultipleChoice):
        from stm.evaluation.questions.multiple_choice import choose

        choose(task, run, weights, splits, output, seed, device)
    elif isinstance(task, Captioning):
        from stm.evaluation.captioning.generate import caption

        caption(task, run, weights, splits, output, seed, device)
    else:
        from stm.evaluation.questions.open_ended import answer

        answer(task, run, weights, splits, output, seed, device)
