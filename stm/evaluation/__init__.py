"""What pretrained weights are worth: classification, retrieval, questions, captions, and the quality of masks."""

from stm.config import EvaluationTask, Run
from stm.evaluation.inputs import EvaluationInputs
from stm.evaluation.tasks import TASKS


def evaluate(task: EvaluationTask, run: Run, inputs: EvaluationInputs) -> None:
    """Evaluates a pretraining run's weights on one task.

    Writes `metrics.json`, with the task's headline (see `Metric.read`), and `predictions.parquet` (`ranks.parquet` of a
    zero-shot retrieval). In tasks with text, `checkpoint` in the former says which weights were tested: those as
    pretrained, the last ones of fine-tuning, or the best on the validation split; never the best on the test split.

    Args:
        task: what to do, with its settings.
        run: the pretraining run, for the shape of its clips.
        inputs: weights, shards and output.

    Raises:
        ValueError: a split lacks labels or captions, the weights are of another architecture than the run's, or the run
            has no `contrast` or `language` that the task needs.
    """
    if not task.suits(run):
        raise ValueError(
            f"{inputs.weights}: its run has no `{task.needs}`, and {task.task} compares videos with texts by it; leave the "
            "run out of this evaluation (`runs`), or evaluate it by a linear probe or fine-tuning"
        )
    TASKS[task.task].load()(task, run, inputs)
