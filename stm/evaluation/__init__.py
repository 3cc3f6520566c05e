"""Evaluation of pretrained weights (classification, retrieval, question answering, captioning) and of mask quality."""

import io
from contextlib import nullcontext, redirect_stderr
from datetime import timedelta

from stm.config import EvaluationTask, Run
from stm.evaluation.inputs import EvaluationInputs
from stm.evaluation.tasks import TASKS

_PATIENCE = timedelta(hours=3)
"""How long processes wait for the first one, which computes metrics alone: captions' scores may take an hour."""


def evaluate(task: EvaluationTask, run: Run, inputs: EvaluationInputs) -> None:
    """Evaluates a pretraining run's weights on one task.

    Writes `metrics.json`, with the task's headline (see `Metric.read`), and `predictions.parquet` (`ranks.parquet` for
    zero-shot retrieval, `kept.parquet` for masks): what each test clip, caption or question counts in the metrics (see
    `stm.evaluation.clip_values`). For tasks with text, `checkpoint` in `metrics.json` records which weights were tested: the
    pretrained weights, the final fine-tuned weights, or the best weights on the validation split. Weights are never
    selected on the test split.

    Under torchrun, each of the task's processes calls this; the first one writes the results. `run_evaluation` starts them.

    Args:
        task: the settings of the task.
        run: the pretraining run, which defines the shape of the clips.
        inputs: weights, shards and output folder.

    Raises:
        ValueError: a split has no labels or captions, the weights' architecture differs from the run's, or the run has
            no `contrast` or `language` section although the task needs it.
    """
    if not task.suits(run):
        raise ValueError(
            f"{inputs.weights}: its run has no `{task.needs}`, which {task.task} needs to compare videos with texts; leave the "
            "run out of this evaluation (`runs`), or evaluate it by a linear probe or fine-tuning"
        )
    from stm.distributed.process import join_processes

    with join_processes(task.world_size, inputs.device, _PATIENCE) as process:
        # One process speaks for all; an error is reported after this block.
        with nullcontext() if process.first else redirect_stderr(io.StringIO()):
            TASKS[task.task].load()(task, run, inputs, process)
        process.wait()
