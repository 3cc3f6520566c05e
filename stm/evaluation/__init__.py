"""What pretrained weights are worth: classification by a linear probe, fine-tuning or label sentences, retrieval by
captions, and the quality of masks.
"""

from collections.abc import Sequence
from pathlib import Path

from stm.config import (
    Captioning,
    EvaluationTask,
    LanguageRun,
    LanguageTask,
    LinearProbe,
    MultipleChoice,
    Retrieval,
    Run,
    Text,
    VideoTextRetrieval,
    ZeroShot,
)
from stm.evaluation.inputs import Splits


def evaluate(
    task: EvaluationTask,
    run: Run,
    weights: Path,
    train_indexes: Sequence[Path],
    test_indexes: Sequence[Path],
    output: Path,
    seed: int,
    device: str | None = None,
    text: Text | None = None,
    validation_indexes: Sequence[Path] = (),
    shared_texts: bool = False,
) -> None:
    """Evaluates a pretraining run's weights on one task.

    Args:
        task: what to do, with its settings.
        run: the pretraining run, for the shape of its clips.
        weights: its `weights.safetensors`.
        train_indexes: `shards/{split}/{shard}.parquet` of the training split; not used by tasks without training.
        test_indexes: likewise of the test split.
        output: folder; gets `metrics.json`, and `predictions.parquet` (see `stm.evaluation.results`) of a
            classification or `ranks.parquet` (see `stm.evaluation.retrieval.zero_shot`) of a retrieval.
        seed: of everything random.
        device: by default CUDA when there is any.
        validation_indexes: likewise of the split on which a task with text chooses its checkpoint.
        shared_texts: whether an equal caption of several clips is one query of retrieval with text, for which each of them
            is right. The benchmark's protocol decides; see `stm.datasets.video_text.tasks.has_shared_texts`.
        text: the text encoder that the run's captions were encoded by; zero-shot classification needs it.

    Raises:
        ValueError: a split lacks labels or captions, the weights are of another architecture than the run's, or the run
            has no `contrast` that the task needs.
    """
    # Imported here, so that `measure_mask_quality` does not load what classification needs.
    if isinstance(task, LanguageTask):
        from stm.evaluation import evaluate_language
        from stm.evaluation.inputs import Splits

        if not isinstance(run, LanguageRun) or run.language is None:
            raise ValueError(f"{task.task} needs a run with `language`")
        splits = Splits(train_indexes, validation_indexes, test_indexes, shared_texts)
        evaluate_language(task, run, weights, splits, output, seed, device)
    elif isinstance(task, LinearProbe):
        from stm.evaluation.classification.linear import probe

        probe(task, run, weights, train_indexes, test_indexes, output, seed, device)
    elif isinstance(task, ZeroShot):
        from stm.evaluation.classification.zero_shot import classify_unseen

        classify_unseen(task, run, weights, test_indexes, output, seed, device, text)
    elif isinstance(task, Retrieval):
        from stm.evaluation.retrieval.zero_shot import retrieve

        retrieve(task, run, weights, test_indexes, output, seed, device)
    else:
        from stm.evaluation.classification.finetune import fine_tune

        fine_tune(task, run, weights, train_indexes, test_indexes, output, seed, device)


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
