"""Classification by action labels: linear probe, fine-tuning, and zero-shot with label sentences."""

from stm.config import FineTune, LinearProbe, ZeroShot
from stm.evaluation.task import Metric, Task

METRICS = (Metric("top1", "top-1", interval="confidence95", chance="chance"), Metric("top5", "top-5"))

TASKS = (
    Task(LinearProbe, "Linear probe", METRICS, "stm.evaluation.classification.linear:probe"),
    Task(FineTune, "Fine-tuning", METRICS, "stm.evaluation.classification.finetune:fine_tune"),
    Task(ZeroShot, "Zero-shot", METRICS, "stm.evaluation.classification.zero_shot:classify_by_sentences"),
)
