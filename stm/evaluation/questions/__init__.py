"""Questions about videos: open-ended answers and multiple choice."""

from stm.config import MultipleChoice, QuestionAnswering
from stm.evaluation.task import Metric, Task

TASKS = (
    Task(
        QuestionAnswering,
        "Questions",
        # Chance is approximately the accuracy of always predicting the most frequent answer, of the training split if it is read.
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
