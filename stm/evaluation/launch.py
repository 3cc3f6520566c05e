"""Starts an evaluation, in this process or in several."""

from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter

from stm.config import EvaluationTask, Run, parse_run
from stm.evaluation.inputs import EvaluationInputs
from stm.training.trackers import check_trackers


def run_evaluation(task: EvaluationTask, run: Run, inputs: EvaluationInputs) -> None:
    """Evaluates with `task.processes` processes on each of `task.nodes` nodes; see `stm.evaluation.evaluate`.

    Raises:
        ValueError: see `evaluate`, or several nodes are needed, but this is not a Slurm job; or a tracker is not installed.
        RuntimeError: the processes under torchrun ended with an error; their own messages precede it in the log.
        stm.training.interruption.Interrupted: after SIGTERM or SIGUSR1. The state of training is saved.
    """
    from stm.evaluation import evaluate
    from stm.training.launch import launch

    check_trackers(inputs.trackers)
    arguments = {
        "task": task.model_dump(mode="json"),
        "run": run.model_dump(mode="json"),
        "inputs": TypeAdapter(EvaluationInputs).dump_python(inputs, mode="json"),
    }
    launch("evaluate", lambda: evaluate(task, run, inputs), arguments, task, inputs.output)


def evaluate_as_requested(request: Mapping[str, Any]) -> None:
    """Evaluates as one of the processes that `run_evaluation` has started."""
    from stm.evaluation import evaluate

    task: EvaluationTask = TypeAdapter(EvaluationTask).validate_python(request["task"])
    inputs = TypeAdapter(EvaluationInputs).validate_python(request["inputs"])
    evaluate(task, parse_run(request["run"]), inputs)
