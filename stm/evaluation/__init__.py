"""Evaluation of pretrained weights: classification, retrieval, questions and captions; and the quality of masks."""

from stm.config import EvaluationTask, Run
from stm.evaluation.inputs import EvaluationInputs
from stm.evaluation.tasks import TASKS


def evaluate(task: EvaluationTask, run: Run, inputs: EvaluationInputs) -> None:
    """Evaluates a pretraining run's weights on one task.

    Writes `metrics.json`, with the task's headline (see `Metric.read`), and `predictions.parquet` (`ranks.parquet` for
    zero-shot retrieval). In tasks with text, `checkpoint` in the former says which weights were tested: the pretrained
    ones, the last ones of fine-tuning, or the best on the validation split; never the best on the test split.

    Args:
        task: the settings of the task.
        run: the pretraining run, for the shape of its clips.
        inputs: weights, shards and output.

    Raises:
        ValueError: a split lacks labels or captions, the architecture of the weights differs from the run's, or the run
            lacks the `contrast` or `language` that the task needs.
    """
    if not task.suits(run):
        raise ValueError(
            f"{inputs.weights}: its run has no `{task.needs}`, which {task.task} needs to compare videos with texts; leave the "
            "run out of this evaluation (`runs`), or evaluate it by a linear probe or fine-tuning"
        )
    TASKS[task.task].load()(task, run, inputs)
