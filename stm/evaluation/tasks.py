"""Every evaluation task, by its name in the config. A new one joins the tuple of its folder."""

from stm.evaluation import captioning, classification, questions, retrieval
from stm.evaluation.task import Task

TASKS: dict[str, Task] = {
    task.name: task for task in (*classification.TASKS, *retrieval.TASKS, *questions.TASKS, *captioning.TASKS)
}
