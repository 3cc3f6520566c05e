"""Questions about videos: open-ended answers and multiple choice."""

from stm.config import MultipleChoice, QuestionAnswering
from stm.evaluation.task import Metric, Task

TASKS = (
    Task(
        QuestionAnswering,
        "Questions",
        # Chance: what the training split's most frequent answer would about reach.
        (Metric("accuracy", "accuracy", interval="confidence95", chance="most_frequent_answer"),),
        "stm.evaluation.questions.open_ended:answer",
    ),
    Task(
        MultipleChoice,
        "Multiple choice",
        (Metric("accuracy", "accuracy", interval="confidence95", chance="chance"),),
        "stm.evaluation.questions.multiple_choice:choose",
    ),
)
