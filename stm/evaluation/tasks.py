"""All evaluation tasks, by their names in the config. To add a task, extend the `TASKS` of its package."""

from stm.evaluation import captioning, classification, masks, questions, retrieval
from stm.evaluation.task import Task

TASKS: dict[str, Task] = {
    task.name: task
    for task in (*classification.TASKS, *retrieval.TASKS, *questions.TASKS, *captioning.TASKS, *masks.TASKS)
}
